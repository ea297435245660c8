"""One sequence to generate: what is asked, and the pieces of the answer as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastcircuit.serving.sampling import Sampling
from fastcircuit.serving.text import TextStream


@dataclass(frozen=True)
class Piece:
    """A part of the answer to choice ``index``; the last one has a ``finish_reason``, or the ``error`` that ended it.

    ``tokens`` counts the tokens behind ``text``, an end-of-text token included.
    """

    index: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Completion:
    """A prompt, how to go on from it, and where the pieces go.

    Args:
        deliver: called from the engine's thread.
    """

    index: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    text: TextStream
    deliver: Callable[[Piece], None]
    generated: int = 0
    unsent_tokens: int = 0
    is_done: bool = False

    def cancel(self) -> None:
        """Nobody waits for the rest: it is given up before its next token."""
        self.is_done = True

    def push(self, token: int, ends_text: bool) -> None:
        """The next token; ``ends_text`` when it is an end-of-text token, which is no part of the text."""
        self.generated += 1
        self.unsent_tokens += 1
        piece = "" if ends_text else self.text.push(token)
        if ends_text or self.text.stopped:
            self._finish(piece, "stop")
        elif self.generated == self.max_tokens:
            self._finish(piece, "length")
        elif piece:
            self._deliver(piece)

    def fail(self, message: str) -> None:
        """The answer ends here, with an error."""
        if not self.is_done:
            self.is_done = True
            self.deliver(Piece(self.index, error=message))

    def _finish(self, piece: str, reason: str) -> None:
        self.is_done = True
        self._deliver(piece + self.text.finish(), "stop" if self.text.stopped else reason)

    def _deliver(self, text: str, finish_reason: str | None = None) -> None:
        self.deliver(Piece(self.index, text, self.unsent_tokens, finish_reason))
        self.unsent_tokens = 0

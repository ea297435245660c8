"""Text from tokens as they come, cut at stop strings."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what some bytes of a character are decoded to
_CONTEXT = 8  # tokens; decoders treat the very first ones differently (a leading space, say)


class TextStream:
    """The text behind a prompt: what :meth:`push` and :meth:`finish` return, put together.

    A character that is spread over several tokens, and what may become a stop string, is held back.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompt: token ids, so that the text continues the prompt (spaces, pieces of words).
        stop: strings at which the text ends; they are not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.text = ""  # all decoded text; the first `sent` characters of it are out
        self.sent = 0
        self._decode = tokenizer.backend_tokenizer.decode
        self._context = list(prompt)  # the tokens before the fresh ones: spaces and pieces of words depend on them
        self._fresh: list[int] = []  # tokens whose text is not decoded yet
        self._stop = list(stop)

    def push(self, token: int) -> str:
        """The text that can go out now that ``token`` is there; :attr:`stopped` says whether a stop string is."""
        self._fresh.append(token)
        piece = self._fresh_text()
        if piece and not piece.endswith(_INCOMPLETE):
            self._context, self._fresh = (self._context + self._fresh)[-_CONTEXT:], []
            self._append(piece)
        return self._send(len(self.text) if self.stopped else len(self.text) - self._possible_stop())

    def finish(self) -> str:
        """What was held back, after the last token."""
        if not self.stopped:
            self._append(self._fresh_text())
        return self._send(len(self.text))

    def _fresh_text(self) -> str:
        before, whole = (self._decode(ids) for ids in (self._context, self._context + self._fresh))
        return whole[len(before) :]

    def _append(self, piece: str) -> None:
        self.text += piece
        found = [at for at in (self.text.find(stop, self.sent) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]

    def _possible_stop(self) -> int:
        """How many characters at the end are the beginning of a stop string."""
        unsent = self.text[self.sent :]
        starts = (at for at in range(len(unsent)) if any(stop.startswith(unsent[at:]) for stop in self._stop))
        return len(unsent) - next(starts, len(unsent))

    def _send(self, end: int) -> str:
        piece, self.sent = self.text[self.sent : end], end
        return piece

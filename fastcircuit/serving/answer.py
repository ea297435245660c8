"""From a request to completions on an engine, and from their pieces to OpenAI's answers."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastcircuit.models.masked import first_line
from fastcircuit.serving.body import CompletionBody
from fastcircuit.serving.completion import Completion, Piece
from fastcircuit.serving.engine import Engine
from fastcircuit.serving.errors import ApiError
from fastcircuit.serving.sampling import Sampling
from fastcircuit.serving.text import TextStream

_MAX_TOKENS = 16  # OpenAI's default


class Answer:
    """The answer to one request: ``n`` choices for every prompt, in the order of the prompts.

    Raises:
        ApiError: a prompt that the tokenizer cannot read, that has unknown tokens, or that is too long.
    """

    def __init__(self, request: CompletionBody, engine: Engine) -> None:
        self.request = request
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._engine = engine
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        prompts = [_tokens(engine, prompt) for prompt in request.prompt]
        limits = [_max_tokens(engine, prompt, request.max_tokens) for prompt in prompts]
        choices = request.n or 1
        self._prompt_tokens = sum(map(len, prompts))
        self._completions = [
            self._completion(at * choices + choice, choice, prompt, limit)
            for at, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
            for choice in range(choices)
        ]
        self._echoes = [_echo(engine, prompt) for prompt in request.prompt for _ in range(choices)]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come, prompts first with ``echo``."""
        self._engine.submit(self._completions)
        if self.request.echo:
            for index, text in enumerate(self._echoes):
                yield Piece(index, text)
        left = len(self._completions)
        while left:
            piece = await self._pieces.get()
            if piece.error is not None:
                raise ApiError(piece.error, status=500)
            left -= piece.is_last
            yield piece

    def cancel(self) -> None:
        """Give up what is not done: nobody waits for it."""
        for completion in self._completions:
            completion.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        texts, reasons, tokens = [""] * len(self._completions), [""] * len(self._completions), 0
        async for piece in self.pieces():
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason or ""
            tokens += piece.tokens
        choices = [_choice(*choice) for choice in zip(range(len(texts)), texts, reasons, strict=True)]
        return {**self.head, "choices": choices, "usage": self._usage(tokens)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces; with ``stream_options.include_usage`` the last one has the usage and no choice."""
        tokens = 0
        async for piece in self.pieces():
            tokens += piece.tokens
            yield {**self.head, "choices": [_choice(piece.index, piece.text, piece.finish_reason)]}
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield {**self.head, "choices": [], "usage": self._usage(tokens)}

    def _completion(self, index: int, choice: int, prompt: Sequence[int], max_tokens: int) -> Completion:
        request = self.request
        seed = None if request.seed is None else (request.seed + choice) % 2**64
        return Completion(
            index=index,
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=Sampling(
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=seed,
            ),
            text=TextStream(self._engine.tokenizer, prompt, request.stop),
            deliver=self._deliver,
        )

    def _deliver(self, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _tokens(engine: Engine, prompt: str | list[int]) -> list[int]:
    """The token ids of a prompt."""
    if isinstance(prompt, str):
        try:
            ids = engine.tokenizer(prompt, verbose=False).input_ids
        except Exception as error:  # tokenizers raise a bare Exception for text outside their vocabulary
            raise ApiError(
                f"the model's tokenizer cannot read the prompt: {first_line(error)}", param="prompt"
            ) from error
        if not ids:
            raise ApiError("the prompt has no token that the model knows", param="prompt")
        return ids
    size = engine.model.config.vocab_size
    wrong = next((token for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise ApiError(f"token id {wrong} is outside the model's vocabulary of {size}", param="prompt")
    return prompt


def _max_tokens(engine: Engine, prompt: Sequence[int], asked: int | None) -> int:
    """How many tokens to generate at most: what is asked, or what is usual and possible."""
    room = engine.max_positions - len(prompt) + 1  # the last token of an answer is not read again
    if room < 1:
        raise ApiError(
            f"the prompt has {len(prompt)} tokens; this circuit takes at most {engine.max_positions}",
            param="prompt",
            code="context_length_exceeded",
        )
    if engine.answers is not None and (asked or 1) > 1:
        raise ApiError(
            f"max_tokens is {asked}, but this circuit only has the logits of its {len(engine.answers)} answer tokens "
            "and answers with one of them: leave max_tokens out, or serve a circuit that has the whole vocabulary",
            param="max_tokens",
        )
    if asked is not None and asked > room:
        raise ApiError(
            f"max_tokens is {asked}, but this circuit takes at most {engine.max_positions} tokens and the prompt has "
            f"{len(prompt)}: ask for at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked or min(1 if engine.answers is not None else _MAX_TOKENS, room)


def _echo(engine: Engine, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt, skip_special_tokens=True)

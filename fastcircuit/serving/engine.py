"""A circuit that answers many completions at once: what waits is generated as one batch, in a thread of its own."""

import copy
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fastcircuit.models.masked import first_line
from fastcircuit.serving.completion import Completion
from fastcircuit.serving.sampling import ChooseTokens

logger = logging.getLogger(__name__)


class Engine:
    """Batches of completions of one model.

    A batch is whatever waits when the batch before it has ended, at most ``max_batch_size`` sequences: nobody waits
    for others to come, and under load batches fill themselves.

    Args:
        model: a ``CircuitForCausalLM`` in eval mode.
        tokenizer: its fast tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch_size: int = 32) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_positions: int = model.model.longest_input or model.config.max_position_embeddings
        self.answers: list[int] | None = model.config.answer_tokens
        ends = model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._waiting: deque[Completion] = deque()
        self._running: list[Completion] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fastcircuit-engine", daemon=True)
        self._thread.start()

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue completions; their pieces are delivered from the engine's thread."""
        with self._changed:
            self._waiting.extend(completions)
            self._changed.notify()

    def load(self) -> dict[str, int]:
        """How many completions wait, and how many are in the batch that is being generated."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": len(self._running)}

    def close(self) -> None:
        """Give up what is left and end the thread."""
        with self._changed:
            self._is_closed = True
            for completion in (*self._waiting, *self._running):
                completion.fail("the server shuts down")
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                with torch.inference_mode():
                    self._answer(batch) if self.answers is not None else self._generate(batch)
            except Exception as error:  # whatever it is, it ends this batch and not the server
                logger.exception("a batch of %d failed", len(batch))
                for completion in batch:
                    completion.fail(f"the model failed: {first_line(error)}")
            with self._changed:
                self._running = []

    def _next_batch(self) -> list[Completion]:
        """Completions from the front of the queue that fit together; none when the engine is closed."""
        with self._changed:
            while not self._is_closed:
                self._waiting = deque(completion for completion in self._waiting if not completion.is_done)
                if self._waiting:
                    self._running = self._take()
                    return self._running
                self._changed.wait()
        return []

    def _take(self) -> list[Completion]:
        """The first of the queue, and those behind it that fit beside it.

        All rows of a batch run as long as its longest answer, so a long prompt and a long answer of another row may be
        too long together although each row alone is not.
        """
        taken: list[Completion] = []
        left: deque[Completion] = deque()
        longest = (0, 0)
        for completion in self._waiting:
            together = max(longest[0], len(completion.prompt)), max(longest[1], completion.max_tokens)
            if len(taken) < self.max_batch_size and sum(together) - 1 <= self.max_positions:
                taken.append(completion)
                longest = together
            else:
                left.append(completion)
        self._waiting = left
        return taken

    def _generate(self, batch: Sequence[Completion]) -> None:
        ids, mask = self._pad(batch)
        self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self._settings(max(completion.max_tokens for completion in batch)),
            logits_processor=LogitsProcessorList([self._chooser(batch)]),
            stopping_criteria=StoppingCriteriaList([_Deliver(batch, self._ends)]),
        )

    def _answer(self, batch: Sequence[Completion]) -> None:
        """One token each, of those that the circuit has logits of."""
        ids, mask = self._pad(batch)
        logits = self.model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
        assert self.answers is not None
        for completion, chosen in zip(batch, self._chooser(batch)(ids, logits).argmax(-1).tolist(), strict=True):
            if not completion.is_done:
                completion.push(self.answers[chosen], ends_text=self.answers[chosen] in self._ends)

    def _settings(self, max_tokens: int) -> GenerationConfig:
        """The model's own settings, greedy: sampling is ours (:class:`ChooseTokens`)."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(do_sample=False, num_beams=1, num_return_sequences=1)
        settings.update(max_new_tokens=max_tokens, max_length=None)
        if settings.pad_token_id is None:
            settings.pad_token_id = 0  # masked, so any token will do
        return settings

    def _chooser(self, batch: Sequence[Completion]) -> ChooseTokens:
        return ChooseTokens([completion.sampling for completion in batch], self.model.device)

    def _pad(self, batch: Sequence[Completion]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask ``[B, S]``, padded on the left; what is padded is masked."""
        width = max(len(completion.prompt) for completion in batch)
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
        for row, completion in enumerate(batch):
            start = width - len(completion.prompt)
            ids[row, start:] = torch.tensor(completion.prompt)
            mask[row, start:] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


class _Deliver(StoppingCriteria):
    """Hands each new token to its completion, and stops the rows that are done."""

    def __init__(self, batch: Sequence[Completion], ends: frozenset[int]) -> None:
        self.batch = batch
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for completion, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not completion.is_done:
                completion.push(token, ends_text=token in self.ends)
        return torch.tensor([completion.is_done for completion in self.batch], device=input_ids.device)

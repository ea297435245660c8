"""Ablated states and answer distributions of examples, one row per token and per answer, in device and host memory.

The first examples are kept on the device, the next ones in host memory (pinned for a GPU, so that their copies overlap
with computing), both up to a budget of bytes; the rest is computed when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastcircuit.models.states import States, StatesShape

Compute = Callable[[Tensor], tuple[States, Tensor]]
DEVICE_BUDGET = 4 * 2**30
HOST_BUDGET = 16 * 2**30


@dataclass(frozen=True)
class Budgets:
    """Bytes of states and distributions to keep in each memory.

    Args:
        device: on the model's device.
        host: in host memory beyond that; of no use, and so 0, for a model on the CPU.
    """

    device: int
    host: int

    @classmethod
    def default(cls, device: torch.device) -> "Budgets":
        """Up to 4 GiB on the device (an eighth of a GPU's free memory), 16 GiB beside a GPU (half of what is free)."""
        if device.type != "cuda":
            return cls(DEVICE_BUDGET, 0)
        free, _ = torch.cuda.mem_get_info(device)
        return cls(min(DEVICE_BUDGET, free // 8), min(HOST_BUDGET, available_host_memory() // 2))


def available_host_memory() -> int:
    """Bytes the system says can be allocated; 0 where it does not say (no /proc/meminfo)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


@dataclass(frozen=True)
class _Tier:
    """Examples ``first`` to ``last`` in one memory: their states, if they have any of their own, and distributions."""

    first: int
    last: int
    rows: Tensor | None
    log_probs: Tensor


class ReferenceCache:
    """What :class:`fastcircuit.evaluation.reference.Reference` keeps.

    Args:
        lengths: tokens of every example, ``[N]``.
        counts: answers of every example, ``[N]``.
        shape: of the states of a token; None: the examples have no states of their own.
        log_prob: an empty ``[0, V]`` tensor like the distributions.
        compute: states and distributions of some examples.
    """

    def __init__(
        self,
        lengths: Tensor,
        counts: Tensor,
        shape: StatesShape | None,
        log_prob: Tensor,
        compute: Compute,
        budgets: Budgets,
    ) -> None:
        self.shape, self.compute, self.device = shape, compute, log_prob.device
        self.lengths, self.counts = lengths, counts
        self._tokens, self._answers = (torch.nn.functional.pad(size.cumsum(0), (1, 0)) for size in (lengths, counts))
        self._log_prob = log_prob
        self._tiers: list[_Tier] = []
        needed = lengths * (0 if shape is None else shape.token_bytes)
        needed = needed + counts * log_prob.shape[1] * log_prob.element_size()
        first = 0
        for budget, device in ((budgets.device, self.device), (budgets.host, torch.device("cpu"))):
            last = first + int((needed[first:].cumsum(0) <= budget).sum())
            if last > first:
                self._tiers.append(self._allocate(first, last, device))
            first = last
        self.num_kept = first

    def fill(self, in_chunks: Callable[[Callable[[int, int], None], int, int], None]) -> None:
        """Compute what is kept; ``in_chunks(call, first, last)`` calls ``call`` for ranges that make up that range."""
        for tier in self._tiers:
            in_chunks(partial(self._fill, tier), tier.first, tier.last)

    def _fill(self, tier: _Tier, first: int, last: int) -> None:
        states, log_probs = self.compute(torch.arange(first, last))
        self._log_probs_of(tier, first, last).copy_(log_probs)
        rows = self._rows_of(tier, first, last)
        if rows is not None and self.shape is not None:
            self.shape.write(states, rows)

    @property
    def num_on_device(self) -> int:
        """Examples on the device."""
        return self._tiers[0].last if self._tiers and self._tiers[0].log_probs.device == self.device else 0

    def token_rows(self, indices: Tensor) -> Tensor:
        """Rows of the examples' tokens, counted over all examples: ``[T]``."""
        return _ranges(self._tokens[indices], self.lengths[indices])

    def answer_rows(self, indices: Tensor) -> Tensor:
        """Rows of the examples' answers, counted over all examples: ``[N]``."""
        return _ranges(self._answers[indices], self.counts[indices])

    def take(self, indices: Tensor) -> tuple[Tensor | None, Tensor]:
        """States ``[T, F]`` (see :class:`StatesShape`) and distributions ``[N, V]`` of some examples, on the device."""
        if self.is_on_device(indices):
            tier = self._tiers[0]
            log_probs = tier.log_probs.index_select(0, self.answer_rows(indices).to(self.device))
            if tier.rows is None:
                return None, log_probs
            return tier.rows.index_select(0, self.token_rows(indices).to(self.device)), log_probs
        rows, log_probs = self.empty(int(self.lengths[indices].sum()), int(self.counts[indices].sum()))
        self.copy(indices, rows, log_probs)
        return rows, log_probs

    def empty(self, tokens: int, answers: int) -> tuple[Tensor | None, Tensor]:
        """States ``[T, F]`` and distributions ``[N, V]`` to fill, on the device, not initialised."""
        rows = None if self.shape is None else self.shape.empty(tokens, self.device)
        return rows, self._log_prob.new_empty(answers, self._log_prob.shape[1])

    def is_on_device(self, indices: Tensor) -> bool:
        """Whether all these examples are on the device."""
        return len(indices) > 0 and int(indices.max()) < self.num_on_device

    def gather(self, token_rows: Tensor, answer_rows: Tensor, rows: Tensor | None, log_probs: Tensor) -> None:
        """Write rows by their numbers, which are on the device as they are themselves; nothing waits."""
        tier = self._tiers[0]
        torch.index_select(tier.log_probs, 0, answer_rows, out=log_probs)
        if rows is not None and tier.rows is not None:
            torch.index_select(tier.rows, 0, token_rows, out=rows)

    def copy(self, indices: Tensor, rows: Tensor | None, log_probs: Tensor) -> None:
        """Write the examples' states and distributions into the first rows of tensors on the device.

        One copy per example straight from where it is kept; copies from pinned memory do not wait.
        """
        missing = [place for place, index in enumerate(indices.tolist()) if index >= self.num_kept]
        computed = iter(self._compute(indices[missing]) if missing else ())
        token = answer = 0
        for index in indices.tolist():
            own_rows, own_log_probs = self._kept(index) if index < self.num_kept else next(computed)
            log_probs[answer : answer + len(own_log_probs)].copy_(own_log_probs, non_blocking=True)
            answer += len(own_log_probs)
            if rows is not None and own_rows is not None:
                rows[token : token + len(own_rows)].copy_(own_rows, non_blocking=True)
                token += len(own_rows)

    def _kept(self, index: int) -> tuple[Tensor | None, Tensor]:
        tier = next(tier for tier in self._tiers if tier.first <= index < tier.last)
        return self._rows_of(tier, index, index + 1), self._log_probs_of(tier, index, index + 1)

    def _compute(self, indices: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """The same of examples that are not kept, computed together."""
        states, log_probs = self.compute(indices)
        answers = log_probs.split(self.counts[indices].tolist())
        if self.shape is None:
            return [(None, part) for part in answers]
        rows = self.shape.empty(states.embeds.shape[1], self.device)
        self.shape.write(states, rows)
        return list(zip(rows.split(self.lengths[indices].tolist()), answers, strict=True))

    def _allocate(self, first: int, last: int, device: torch.device) -> _Tier:
        pinned = device.type == "cpu" and self.device.type == "cuda"
        tokens, answers = (int(at[last] - at[first]) for at in (self._tokens, self._answers))
        rows = None if self.shape is None else self.shape.empty(tokens, device, pinned)
        like = self._log_prob
        log_probs = torch.empty(answers, like.shape[1], dtype=like.dtype, device=device, pin_memory=pinned)
        return _Tier(first, last, rows, log_probs)

    def _rows_of(self, tier: _Tier, first: int, last: int) -> Tensor | None:
        begin = self._tokens[tier.first]
        return None if tier.rows is None else tier.rows[self._tokens[first] - begin : self._tokens[last] - begin]

    def _log_probs_of(self, tier: _Tier, first: int, last: int) -> Tensor:
        begin = self._answers[tier.first]
        return tier.log_probs[self._answers[first] - begin : self._answers[last] - begin]


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``start, start + 1, ..., start + length - 1`` for each pair, one after the other."""
    offsets = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.repeat_interleave(starts, lengths) + offsets

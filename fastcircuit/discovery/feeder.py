"""Micro-batches for the static step, prepared ahead: while the device computes one, the next is laid out and copied."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcircuit.discovery.buckets import Bucket
from fastcircuit.discovery.static_step import Inputs
from fastcircuit.evaluation.reference import Reference


@dataclass
class _Slot:
    """Where one micro-batch waits: its numbers in (pinned) host memory, what is not on the device yet beside them."""

    numbers: Tensor
    rows: Tensor | None = None
    log_probs: Tensor | None = None
    filled: torch.cuda.Event | None = None
    emptied: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Prepared:
    """A micro-batch on its way."""

    bucket: Bucket
    indices: Tensor
    slot: _Slot


@dataclass
class _Ring:
    """Two slots of a bucket, used in turns."""

    slots: list[_Slot] = field(default_factory=list)
    turn: int = 0


class Feeder:
    """Prepares micro-batches of ``reference`` in two slots per bucket, and hands them to the step's buffers.

    On a CUDA device copies run on a stream of their own and the host waits for nothing but a slot that is still being
    read, two micro-batches later.

    Args:
        rows: examples of a full micro-batch.
    """

    def __init__(self, reference: Reference, rows: int) -> None:
        self.reference, self.rows = reference, rows
        self.device = reference.model.device
        self.cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self.cuda else None
        self._rings: dict[Bucket, _Ring] = {}

    def prepare(self, indices: Tensor, num_examples: int) -> Prepared:
        """Lay out the examples ``indices`` of a step of ``num_examples``, and start the copies that can start."""
        bucket = Bucket.of(self.reference, indices, self.rows)
        slot = self._next_slot(bucket)
        bucket.fill(slot.numbers, self.reference, indices, num_examples)
        cache = self.reference.cache
        if not cache.is_on_device(indices):
            if slot.log_probs is None:
                slot.rows, slot.log_probs = cache.empty(bucket.tokens, bucket.answers)
                self._wait(self._stream, torch.cuda.current_stream(self.device) if self.cuda else None)
            with self._copying():
                cache.copy(indices, slot.rows, slot.log_probs)
                self._repeat_first(indices, slot)
                if self._stream is not None:
                    slot.filled = self._stream.record_event()
        return Prepared(bucket, indices, slot)

    def take(self, prepared: Prepared, inputs: Inputs) -> None:
        """Fill the step's buffers with a prepared micro-batch, on the current stream."""
        slot, cache = prepared.slot, self.reference.cache
        inputs.numbers.copy_(slot.numbers, non_blocking=True)
        if cache.is_on_device(prepared.indices):
            parts = prepared.bucket.split(inputs.numbers)
            cache.gather(parts["token_rows"], parts["answer_rows"], inputs.rows, inputs.log_probs)
        else:
            if slot.filled is not None:
                torch.cuda.current_stream(self.device).wait_event(slot.filled)
            assert slot.log_probs is not None
            inputs.log_probs.copy_(slot.log_probs)
            if inputs.rows is not None and slot.rows is not None:
                inputs.rows.copy_(slot.rows)
        if self.cuda:
            slot.emptied = torch.cuda.current_stream(self.device).record_event()

    def _next_slot(self, bucket: Bucket) -> _Slot:
        ring = self._rings.setdefault(bucket, _Ring())
        if len(ring.slots) < 2:
            ring.slots.append(_Slot(torch.empty(bucket.size, dtype=torch.int64, pin_memory=self.cuda)))
            return ring.slots[-1]
        slot, ring.turn = ring.slots[ring.turn], 1 - ring.turn
        if slot.emptied is not None:
            slot.emptied.synchronize()
        return slot

    def _repeat_first(self, indices: Tensor, slot: _Slot) -> None:
        """The first row once more for every token and answer that is there to fill the bucket."""
        lengths, counts = self.reference.lengths[indices], self.reference.counts[indices]
        for rows, count in ((slot.rows, int(lengths.sum())), (slot.log_probs, int(counts.sum()))):
            if rows is not None and count < len(rows):
                rows[count:] = rows[0]

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @staticmethod
    def _wait(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
        if stream is not None and other is not None:
            stream.wait_stream(other)

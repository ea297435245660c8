"""Batches of a few fixed shapes: what a step needs to know of a batch, laid out in one buffer of integers.

The number of packed tokens T and of answers N is rounded up to a bucket's. A token too many is a twin of the batch's
first token: it reads that token's row and nothing reads it. An answer too many has weight 0 and
lies where no answer is.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.packing import FixedPacking

_FINEST_TOKENS, _FINEST_ANSWERS = 16, 8


def round_up(count: int, finest: int) -> int:
    """The least multiple of ``finest``, or of an eighth of the next power of two, that is not below ``count``.

    At most an eighth is padding, and a run meets few different results.
    """
    step = max(finest, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


@dataclass(frozen=True)
class Bucket:
    """The shape of a step.

    Args:
        rows: sequences B; a smaller batch leaves rows empty.
        longest: places of a row, ``S``.
        tokens: packed tokens T.
        answers: answer positions N.
        full: the batch has B rows of S tokens, so that nothing needs padding.
    """

    rows: int
    longest: int
    tokens: int
    answers: int
    full: bool

    @classmethod
    def of(cls, reference: Reference, indices: Tensor, rows: int) -> "Bucket":
        """The bucket of the examples ``indices`` in a step of ``rows`` rows."""
        lengths, answers = reference.lengths[indices], int(reference.counts[indices].sum())
        tokens, longest = int(lengths.sum()), int(lengths.max())
        return cls(rows, longest, tokens, answers, tokens == rows * longest).rounded()

    def rounded(self) -> "Bucket":
        """The bucket that holds a batch of this shape."""
        tokens, longest = self.tokens, self.longest
        if not self.full:
            tokens, longest = round_up(tokens, _FINEST_TOKENS), round_up(longest, _FINEST_TOKENS)
        answers = min(tokens, round_up(self.answers, _FINEST_ANSWERS))
        return Bucket(self.rows, longest, tokens, answers, self.full)

    @cached_property
    def fields(self) -> dict[str, int]:
        """Numbers of the buffer by name, in order."""
        return {
            "token_ids": self.tokens,
            "position_ids": self.tokens,
            "unpad_index": self.tokens,
            "token_rows": self.tokens,
            "pad_index": self.rows * self.longest,
            "lengths": self.rows,
            "answers": self.answers,
            "answer_rows": self.answers,
            "weights": self.answers,
        }

    @property
    def size(self) -> int:
        """Numbers in the buffer."""
        return sum(self.fields.values())

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts of an int64 buffer ``[size]``, as views; the weights are float64 in the same eight bytes."""
        parts = dict(zip(self.fields, buffer.split(list(self.fields.values())), strict=True))
        return {**parts, "weights": parts["weights"].view(torch.float64)}

    def packing(self, parts: dict[str, Tensor]) -> FixedPacking:
        """The packing whose contents are those parts."""
        return FixedPacking(
            self.longest, parts["position_ids"], parts["pad_index"], parts["unpad_index"], parts["lengths"], self.full
        )

    def fill(self, buffer: Tensor, reference: Reference, indices: Tensor, num_examples: int) -> None:
        """Write the examples ``indices`` into a buffer on the CPU.

        Args:
            num_examples: of the whole step, which may be more than there are in this micro-batch: an answer's weight is
                one over its example's answers and over the step's examples.
        """
        examples, parts = reference.examples.select(indices), self.split(buffer)
        lengths, counts = reference.lengths[indices], reference.counts[indices]
        starts, tokens = lengths.cumsum(0) - lengths, int(lengths.sum())
        rows = torch.repeat_interleave(torch.arange(len(indices)), lengths)
        places = torch.arange(tokens) - starts[rows]
        _fill(parts["token_ids"], examples.input_ids[examples.attention_mask])
        _fill(parts["position_ids"], places)
        _fill(parts["unpad_index"], rows * self.longest + places)
        _fill(parts["token_rows"], reference.cache.token_rows(indices))
        firsts = torch.full((self.rows,), tokens)
        firsts[: len(indices)] = starts
        pad = (firsts[:, None] + torch.arange(self.longest)).clamp(max=tokens - 1)
        parts["pad_index"].copy_(pad.flatten())
        parts["lengths"].fill_(1)[: len(indices)] = lengths
        answers = (examples.answer_mask[examples.attention_mask]).nonzero().squeeze(1)
        self._fill_answers(parts, answers)
        _fill(parts["answer_rows"], reference.cache.answer_rows(indices))
        share = 1 / (counts.double() * num_examples)
        parts["weights"].zero_()[: len(answers)] = torch.repeat_interleave(share, counts)

    def _fill_answers(self, parts: dict[str, Tensor], answers: Tensor) -> None:
        """The answers' tokens, and for those too many some token that holds no answer."""
        elsewhere = torch.ones(self.tokens, dtype=torch.bool)
        elsewhere[answers] = False
        parts["answers"][: len(answers)] = answers
        if len(answers) < self.answers:
            parts["answers"][len(answers) :] = elsewhere.nonzero()[0]


def _fill(part: Tensor, values: Tensor) -> None:
    """``values``, and the first of them again in what is left."""
    part[: len(values)] = values
    part[len(values) :] = values[0]

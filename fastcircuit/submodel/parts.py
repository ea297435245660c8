"""A submodel under construction: its parts in the order in which they write to the stream. Compile passes map it.

Weight matrices are the original model's own (views where possible) and stay in its dtype; biases and constants are
float64, so that adding them up costs no precision.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """``y = x weight^T + bias``: weight ``[out, in]``, bias ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def add_bias(self, values: Tensor) -> "Affine":
        """The same map with ``values`` ``[out]`` added to what it returns."""
        return Affine(self.weight, values if self.bias is None else self.bias + values)

    def rows(self, rows: Tensor) -> "Affine":
        """Only these outputs, ``[N]``."""
        return Affine(self.weight[rows], None if self.bias is None else self.bias[rows])

    def chunk(self, count: int) -> tuple["Affine", ...]:
        """Maps to ``count`` equal parts of the output."""
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        return tuple(Affine(weight, bias) for weight, bias in zip(self.weight.chunk(count), biases, strict=True))


@dataclass(frozen=True)
class Norm:
    """Weights of a norm, ``[d]`` each: ``normalised * weight + bias``; both None once they are folded away."""

    weight: Tensor | None
    bias: Tensor | None = None

    def fold_into(self, affine: Affine) -> Affine:
        """One map of the bare normalised input: ``W (w * n + b) + c = (W w) n + (W b + c)``."""
        if self.weight is None:
            return affine
        weight = affine.weight.double()
        folded = Affine((weight * self.weight).to(affine.weight.dtype), affine.bias)
        return folded if self.bias is None else folded.add_bias(weight @ self.bias)


@dataclass(frozen=True)
class AttentionPart:
    """Kept heads of one layer; the projections of the heads stand one below the other."""

    layer: int
    norm: Norm
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    scale: float
    sliding: bool = False


@dataclass(frozen=True)
class MlpPart:
    """One MLP: ``down(act(up(n)))``, or ``down(act(gate(n)) * up(n))`` when gated."""

    layer: int
    norm: Norm
    gate: Affine | None
    up: Affine
    output: Affine


@dataclass(frozen=True)
class ConstantPart:
    """What removed components write, ``[P, d]``: one vector, or one per position."""

    values: Tensor


Part = AttentionPart | MlpPart | ConstantPart
Block = tuple[Part, ...]


@dataclass(frozen=True)
class Program:
    """A whole submodel.

    Args:
        tokens: token embeddings ``[V, d]``; positions: position table ``[N, d]``, or None with rotary positions.
        blocks: the parts, block by block.
        final_norm, head: what turns the final stream into logits.
        tied: whether the head's weight is the token embeddings.
        settings: what the compile passes do not touch, as arguments of ``CircuitConfig``.
        answer_tokens: the token ids the head is restricted to, or None.
    """

    tokens: Tensor
    positions: Tensor | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Affine
    tied: bool
    head_dim: int
    settings: dict[str, Any]
    answer_tokens: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order in which they write."""
        return tuple(part for block in self.blocks for part in block)

    def with_blocks(self, blocks: Sequence[Sequence[Part]]) -> "Program":
        return dataclasses.replace(self, blocks=tuple(tuple(block) for block in blocks))


def vector(values: Tensor | None) -> Tensor | None:
    """A bias or norm weight in float64."""
    return None if values is None else values.detach().double()

"""One component between its reads and what it writes, forward and back: a block's attention, a block's MLP.

Backward is written by hand where it saves memory (norms and projections work in place, on one buffer) and left to
autograd in between (attention itself, the model's own MLP).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcircuit.models.anatomy import Attention, Block


@dataclass
class AttentionRun:
    """Some heads of a block.

    Args:
        attention: the heads' weights.
        attend: queries, keys, values ``[heads, T, d_head]`` to ``[T, H * d_head]``, differentiable.
        reads: what each head's query, then each key, then each value sees, ``[readers, T, d]``; ``[1, T, d]`` when all
            of them see the same.
    """

    attention: Attention
    attend: Callable[[tuple[Tensor, ...]], Tensor]
    reads: Tensor
    _projected: tuple[Tensor, ...] = field(init=False, default=())
    _out: Tensor | None = field(init=False, default=None)

    def forward(self, keep_graph: bool) -> Tensor:
        """The heads' outputs before the output projection, ``[T, H * d_head]``."""
        projections = self.attention.projections
        normed = self.attention.norm(self.reads)
        shared = normed.shape[0] == 1
        parts = [normed] * 3 if shared else normed.split([projection.heads for projection in projections])
        projected = tuple(projection(part) for projection, part in zip(projections, parts, strict=True))
        if not keep_graph:
            return self.attend(projected)
        with torch.enable_grad():
            self._projected = tuple(part.requires_grad_() for part in projected)
            self._out = self.attend(self._projected)
        return self._out.detach()

    def backward(self, grad_out: Tensor, grad_reads: Tensor) -> None:
        """Write the gradient of the reads into ``grad_reads`` ``[readers, T, d]``."""
        projections = self.attention.projections
        assert self._out is not None
        grads = torch.autograd.grad(self._out, self._projected, grad_out)
        parts = grad_reads.split([projection.heads for projection in projections])
        for projection, grad, part in zip(projections, grads, parts, strict=True):
            projection.backward(grad, part)
        self.attention.norm.backward_(grad_reads, self.reads.expand_as(grad_reads))


@dataclass
class MlpRun:
    """The MLP of a block; ``read`` is what it sees, ``[T, d]``."""

    block: Block
    read: Tensor
    _normed: Tensor | None = field(init=False, default=None)
    _out: Tensor | None = field(init=False, default=None)

    def forward(self, keep_graph: bool) -> Tensor:
        """What the MLP writes, ``[T, d]``."""
        normed = self.block.mlp_norm(self.read)
        if not keep_graph:
            return self.block.mlp(normed)
        with torch.enable_grad():
            self._normed = normed.requires_grad_()
            self._out = self.block.mlp(self._normed)
        return self._out.detach()

    def backward(self, grad_out: Tensor) -> Tensor:
        """The gradient of the read, ``[T, d]``."""
        assert self._normed is not None
        assert self._out is not None
        (grad,) = torch.autograd.grad(self._out, self._normed, grad_out)
        return self.block.mlp_norm.backward_(grad.contiguous(), self.read)

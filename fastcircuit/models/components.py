"""One component between its inputs and what it writes, forward and back: a block's attention, a block's MLP; and
what a forward pass leaves of the two for backward.

Backward is written by hand where it saves memory (norms and projections work in place, on one buffer) and left to
autograd in between (attention itself, an MLP that no kernel is for).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcircuit.models.anatomy import Attention, Block, Projection
from fastcircuit.models.inputs import Inputs


@dataclass
class AttentionRun:
    """Some heads of a block.

    Args:
        attention: the heads' weights.
        attend: queries, keys, values ``[heads, T, d_head]`` to ``[T, H * d_head]``, differentiable.
        inputs: of each head's query, then each key, then each value, ``[readers, T, d]`` or ``[1, T, d]`` when all of
            them see the same; or three, of queries, of keys and of values, to hold one of them at a time. The last one
            may have plain readers beside those.
    """

    attention: Attention
    attend: Callable[[tuple[Tensor, ...]], Tensor]
    inputs: Sequence[Inputs]
    _projected: tuple[Tensor, ...] = field(init=False, default=())
    _out: Tensor | None = field(init=False, default=None)

    def forward(self, keep_graph: bool) -> Tensor:
        """The heads' outputs before the output projection, ``[T, H * d_head]``."""
        projected: tuple[Tensor, ...] = ()
        for inputs, projections in self._shares():
            projected += inputs.project(projections)
        if not keep_graph:
            return self.attend(projected)
        with torch.enable_grad():
            self._projected = tuple(part.requires_grad_() for part in projected)
            self._out = self.attend(self._projected)
        return self._out.detach()

    def rest(self) -> Tensor:
        """What the plain readers see, ``[plain, T, d]``."""
        return self.inputs[-1].rest()

    def backward(self, grad_out: Tensor, grad_rest: Tensor | None = None) -> Iterator[Tensor]:
        """The gradients of the reads of each of the inputs, ``[readers, T, d]``.

        Args:
            grad_rest: of what the plain readers saw, ``[plain, T, d]``.
        """
        assert self._out is not None
        grads = list(torch.autograd.grad(self._out, self._projected, grad_out))
        for inputs, projections in self._shares():
            heads = sum(projection.heads for projection in projections)
            width = projections[0].weight.shape[1]
            grad = grad_out.new_empty(heads + inputs.plain, len(grad_out), width)
            if inputs.plain:
                assert grad_rest is not None
                grad[heads:] = grad_rest
            some, grads = grads[: len(projections)], grads[len(projections) :]
            yield inputs.project_backward(projections, some, grad)

    def _shares(self) -> Iterator[tuple[Inputs, tuple[Projection, ...]]]:
        """Each of the inputs with the projections it is for."""
        count = len(self.attention.projections) // len(self.inputs)
        for place, inputs in enumerate(self.inputs):
            yield inputs, self.attention.projections[place * count : (place + 1) * count]


@dataclass
class MlpRun:
    """The MLP of a block; ``inputs`` is what it sees, ``[1, T, d]``."""

    block: Block
    inputs: Inputs
    _normed: Tensor | None = field(init=False, default=None)
    _out: Tensor | None = field(init=False, default=None)
    _slopes: Tensor | None = field(init=False, default=None)

    def forward(self, keep_graph: bool) -> Tensor:
        """What the MLP writes, ``[T, d]``."""
        normed, gate, backend = self.inputs.forward()[0], self.inputs.gate, self.inputs.backend
        if not keep_graph:
            return self.block.mlp(normed, gate, backend)
        if gate is None and self.block.mlp.runs_by_hand(normed, backend):
            out, self._slopes = self.block.mlp.forward(normed, keep=True)
            return out
        with torch.enable_grad():
            self._normed = normed.requires_grad_()
            self._out = self.block.mlp(self._normed, gate, backend)
        return self._out.detach()

    def backward(self, grad_out: Tensor) -> Tensor:
        """The gradient of the read, ``[1, T, d]``."""
        if self._slopes is not None:
            return self.inputs.backward_(self.block.mlp.backward(grad_out, self._slopes)[None])
        assert self._normed is not None
        assert self._out is not None
        (grad,) = torch.autograd.grad(self._out, self._normed, grad_out)
        return self.inputs.backward_(grad.contiguous()[None])


@dataclass
class LayerRun:
    """One layer: its live parts with their graphs, or what it takes to make those again.

    Args:
        base: what the layer's readers see with all masks 0, ``[T, d]`` (or ``[1, d]``).
        written: what its ablated heads write together; of the last layer, what its MLP sees with all masks 0.
        fixed_base: what its readers see at the tokens that cannot change, if there are any, whatever the masks are.
    """

    base: Tensor
    written: Tensor
    fixed_base: Tensor | None = None
    attention: AttentionRun | None = None
    mlp: MlpRun | None = None

    @property
    def has_graphs(self) -> bool:
        return self.attention is not None or self.mlp is not None

    def drop_graphs(self) -> None:
        self.attention = self.mlp = None

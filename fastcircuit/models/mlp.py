"""A block's MLP: as the model computes it, or by its parts where a kernel of ours is the better way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from fastcircuit import ops
from fastcircuit.models.gate import Gate, product
from fastcircuit.ops.mlp import runs_compiled


@dataclass(frozen=True)
class Parts:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))``.

    Args:
        gate, up, down: as :func:`fastcircuit.ops.mlp` takes them; no gate is the plain form.
        act: applied number by number.
        watched: the modules these are taken from: while one has a hook, they are called and nothing else.
    """

    gate: ops.Affine | None
    up: ops.Affine
    down: ops.Affine
    act: Callable[[Tensor], Tensor]
    watched: tuple[nn.Module, ...]

    @property
    def first(self) -> ops.Affine:
        """What the activation is of."""
        return self.gate or self.up

    @property
    def are_plain(self) -> bool:
        """Whether nothing but the parts makes the result."""
        return not any(_is_watched(module) for module in self.watched)


@dataclass(frozen=True)
class Mlp:
    """One block's MLP, token-wise.

    Args:
        function: all of it, as the model computes it, ``[..., d] -> [..., d]``, differentiable.
        parts: what it consists of; None: only ``function`` knows.
    """

    function: Callable[[Tensor], Tensor]
    parts: Parts | None = None

    def __call__(self, x: Tensor, gate: Gate | None = None, backend: str = "auto") -> Tensor:
        """What it writes, ``[..., d] -> [..., d]``; with a gate ``[T, d]``, and anything if the gate leaves it out."""
        parts = self.parts
        if gate is not None and parts is not None and gate.closes(x[None], parts.first.weight[None]):
            return self._gated(x, parts, gate) if parts.are_plain else self.function(x)
        recorded = torch.is_grad_enabled() and x.requires_grad
        if recorded or not self.runs_by_hand(x, backend):
            return self.function(x)
        return self.forward(x.flatten(0, -2), keep=False)[0].view_as(x)

    def runs_by_hand(self, x: Tensor, backend: str = "auto") -> bool:
        """Whether :meth:`forward` and :meth:`backward` are to be used for ``x``, not ``function`` under autograd."""
        parts = self.parts
        if parts is None or activation_name(parts.act) is None or x.dim() < 2:
            return False
        weight = parts.up.weight
        if weight.requires_grad and torch.is_grad_enabled():
            return False
        return runs_compiled(x, weight, backend) and parts.are_plain

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """``[T, d] -> [T, d]``, and what :meth:`backward` needs."""
        parts = self.parts
        assert parts is not None
        name = activation_name(parts.act)
        assert name is not None
        return ops.mlp(x, parts.gate, parts.up, parts.down, name, keep=keep)

    def backward(self, grad: Tensor, slopes: Tensor) -> Tensor:
        """The gradient of the input, ``[T, d]``, from that of the output."""
        parts = self.parts
        assert parts is not None
        return ops.mlp_grad(grad, slopes, parts.gate, parts.up, parts.down)

    def _gated(self, x: Tensor, parts: Parts, gate: Gate) -> Tensor:
        hidden = parts.act(_product(x[None], parts.first, gate))
        if parts.gate is not None:
            hidden = hidden * _product(x[None], parts.up, gate)
        return _product(hidden, parts.down, gate)[0]


def _product(x: Tensor, affine: ops.Affine, gate: Gate) -> Tensor:
    bias = None if affine.bias is None else affine.bias[None, None]
    return product(x, affine.weight[None], bias, gate)


def linear(layer: nn.Linear) -> ops.Affine:
    """A linear layer as what is multiplied from the right."""
    return ops.Affine(layer.weight.T, layer.bias)


def activation_name(act: Any) -> str | None:
    """The name that :func:`fastcircuit.ops.mlp` has for an activation; None: it has none."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return _ACTIVATIONS.get(type(act))


def _is_watched(module: nn.Module) -> bool:
    """Whether a module does more than its class says: it has hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
}

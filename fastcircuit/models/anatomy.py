"""The parts of a decoder, as views of a Hugging Face model's weights: all that the masked forward loop needs to know.

An architecture file (gpt2.py, llama.py, ...) holds one function that fills these dataclasses. Nothing is copied:
weights are the model's own tensors, reshaped to heads.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from fastcircuit import ops
from fastcircuit.ops.mlp import runs_compiled


@dataclass(frozen=True)
class Norm:
    """LayerNorm (``centered``) or RMSNorm of each token, statistics in float32 or better.

    Args:
        weight: ``[d]``.
        bias: ``[d]``, or None.
        eps: added to the variance, or to the mean square.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        if self.centered:
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.rms_norm(x, self.weight, self.eps)

    def backward_(self, grad: Tensor, x: Tensor) -> Tensor:
        """Turn ``grad``, that of the norm of ``x``, into the gradient of ``x``, in place."""
        return ops.norm_backward_(grad, x, self.weight, self.eps, self.centered)


class NoNorm:
    """Where a model has no norm: every token as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def backward_(self, grad: Tensor, x: Tensor) -> Tensor:
        """``grad`` itself."""
        return grad


@dataclass(frozen=True)
class Projection:
    """Per-head linear map of a reader's normalised input: ``y[n] = x[n] @ weight[n] + bias[n]``.

    Args:
        weight: ``[heads, d, d_head]`` view.
        bias: ``[heads, 1, d_head]`` view, or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def heads(self) -> int:
        return self.weight.shape[0]

    def take(self, heads: Tensor) -> "Projection":
        """Only these heads, copied."""
        bias = None if self.bias is None else self.bias.index_select(0, heads)
        return Projection(self.weight.index_select(0, heads), bias)

    def one(self, head: int) -> "Projection":
        """Only this head, not copied."""
        place = slice(head, head + 1)
        return Projection(self.weight[place], None if self.bias is None else self.bias[place])

    def backward(self, grad: Tensor, grad_x: Tensor) -> None:
        """Write the gradient of ``x`` ``[heads, T, d]`` into ``grad_x``, given that of the result."""
        torch.bmm(grad, self.weight.transpose(1, 2), out=grad_x)

    def __call__(self, x: Tensor) -> Tensor:
        """``[heads, T, d] -> [heads, T, d_head]``; ``x`` may be ``[1, T, d]`` when every head reads the same."""
        if x.shape[0] == 1 and self.heads > 1:
            x = x.expand(self.heads, -1, -1)
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


@dataclass(frozen=True)
class Attention:
    """One block's attention.

    Args:
        norm: the norm in front of the projections, token-wise.
        query, key, value: per-head projections (key and value per key/value head).
        out_weight: ``[heads, d_head, d]`` view of the output projection.
        out_bias: ``[d]``, or None.
        scale: factor on the scores before the softmax.
        window: keys further back than this many tokens are not seen; None: all are.
    """

    norm: Norm | NoNorm
    query: Projection
    key: Projection
    value: Projection
    out_weight: Tensor
    out_bias: Tensor | None
    scale: float
    window: int | None = None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Query, key and value, in the order of the readers."""
        return self.query, self.key, self.value

    def take(self, heads: Tensor, kv_heads: Tensor) -> "Attention":
        """Only these heads and key/value heads; copies their query, key and value weights."""
        return dataclasses.replace(
            self, query=self.query.take(heads), key=self.key.take(kv_heads), value=self.value.take(kv_heads)
        )


@dataclass(frozen=True)
class Mlp:
    """One block's MLP, token-wise: a function, and where that is known what it consists of.

    Args:
        function: ``[..., d] -> [..., d]``, differentiable.
        weights: gate (or None), up and down, as :func:`fastcircuit.ops.mlp` takes them; None: only ``function`` knows.
        activation: its name there.
        watched: the modules that ``function`` calls: while one has a hook, it is called and nothing else.
    """

    function: Callable[[Tensor], Tensor]
    weights: tuple[ops.Affine | None, ops.Affine, ops.Affine] | None = None
    activation: str = ""
    watched: tuple[nn.Module, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        recorded = torch.is_grad_enabled() and x.requires_grad
        if recorded or not self.runs_by_hand(x):
            return self.function(x)
        return self.forward(x.flatten(0, -2), keep=False)[0].view_as(x)

    def runs_by_hand(self, x: Tensor) -> bool:
        """Whether :meth:`forward` and :meth:`backward` are to be used for ``x``, not ``function`` under autograd."""
        if self.weights is None or x.dim() < 2:
            return False
        weight = self.weights[1].weight
        if weight.requires_grad and torch.is_grad_enabled():
            return False
        return runs_compiled(x, weight) and not any(_is_watched(module) for module in self.watched)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """``[T, d] -> [T, d]``, and what :meth:`backward` needs."""
        assert self.weights is not None
        return ops.mlp(x, *self.weights, self.activation, keep=keep)

    def backward(self, grad: Tensor, slopes: Tensor) -> Tensor:
        """The gradient of the input, ``[T, d]``, from that of the output."""
        assert self.weights is not None
        return ops.mlp_grad(grad, slopes, *self.weights)


@dataclass(frozen=True)
class Block:
    """Attention, then an MLP (with the norm in front of it) that also reads the attention of its own block."""

    attention: Attention
    mlp_norm: Norm | NoNorm
    mlp: Mlp


@dataclass(frozen=True)
class Anatomy:
    """A whole decoder.

    Args:
        embed: token ids and positions ``[T]`` to the embedding writers' outputs, ``[T, d]`` each.
        blocks: the layers.
        final_norm: the norm in front of the unembedding.
        unembed: ``[N, d] -> [N, vocabulary]``.
        rotary: positions ``[T]`` to ``(cos, sin)``, ``[T, d_rotary]`` each; None without rotary positions.
        causal: whether a token sees only itself and what comes before.
    """

    embed: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    blocks: tuple[Block, ...]
    final_norm: Norm | NoNorm
    unembed: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    causal: bool = True


def layer_norm(module: nn.LayerNorm) -> Norm:
    """The LayerNorm of ``module``."""
    return Norm(module.weight, module.bias, module.eps, centered=True)


def rms_norm(weight: Tensor, eps: float) -> Norm:
    """``x / sqrt(mean(x^2) + eps) * weight``."""
    return Norm(weight, None, eps, centered=False)


def linear_heads(layer: nn.Linear, heads: int) -> Projection:
    """A ``[heads * d_head, d]`` linear layer as one projection per head."""
    weight = layer.weight.view(heads, -1, layer.in_features).transpose(1, 2)
    bias = None if layer.bias is None else layer.bias.view(heads, 1, -1)
    return Projection(weight, bias)


def linear_output(layer: nn.Linear, heads: int) -> Tensor:
    """The ``[heads, d_head, d]`` view of a ``[d, heads * d_head]`` output projection."""
    return layer.weight.view(layer.out_features, heads, -1).permute(1, 2, 0)


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

"""The parts of a decoder, as views of a Hugging Face model's weights: all that the masked forward loop needs to know.

An architecture file (gpt2.py, llama.py, ...) holds one function that fills these dataclasses. Nothing is copied:
weights are the model's own tensors, reshaped to heads.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fastcircuit import ops
from fastcircuit.models.gate import Gate, product, product_
from fastcircuit.models.mlp import Mlp


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

    def backward(self, grad: Tensor, grad_x: Tensor, gate: Gate | None = None) -> None:
        """Write the gradient of ``x`` ``[heads, T, d]`` into ``grad_x``, given that of the result."""
        product_(grad_x, grad, self.weight.transpose(1, 2), gate)

    def __call__(self, x: Tensor, gate: Gate | None = None) -> Tensor:
        """``[heads, T, d] -> [heads, T, d_head]``; ``x`` may be ``[1, T, d]`` when every head reads the same.

        Results and gradients of heads that the gate leaves out may hold anything.
        """
        if x.shape[0] == 1 and self.heads > 1:
            x = x.expand(self.heads, -1, -1)
        return product(x, self.weight, self.bias, gate)


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

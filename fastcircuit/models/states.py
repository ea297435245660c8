"""What every writer wrote in one unmasked run: the corrupted activations, in each head's own width."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.models.anatomy import Anatomy, Attention
from fastcircuit.models.packing import Packing
from fastcircuit.ops import packed_attention
from fastcircuit.ops.packed_attention import runs_packed
from fastcircuit.ops.reference import rotate

Rotary = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class States:
    """Writer outputs ``y~`` of one run over T packed tokens; an axis of size 1 in place of T holds for every token.

    Args:
        embeds: outputs of the embedding tables, ``[E, T, d]``.
        heads: what each head passes to its output projection, ``[L, T, H * d_head]``; head h writes
            ``heads[l, :, h] @ W_O[h] + b_O / H``.
        mlps: MLP outputs, ``[L, T, d]``.
        has_output_bias: whether ``b_O`` is part of what the heads wrote; False when zero ablation removes it too.
    """

    embeds: Tensor
    heads: Tensor
    mlps: Tensor
    has_output_bias: bool = True

    def take(self, tokens: Tensor) -> "States":
        """The states of the given packed tokens, ``[N]``."""
        embeds, heads, mlps = (
            value if value.shape[1] == 1 else value.index_select(1, tokens)
            for value in (self.embeds, self.heads, self.mlps)
        )
        return States(embeds, heads, mlps, self.has_output_bias)

    def last_layer(self, tokens: Tensor) -> "States":
        """The last layer's states at the given packed tokens, under every layer's number; no other's are copied."""
        heads, mlps = (
            part if part.shape[1] == 1 else part[-1:].index_select(1, tokens).expand(len(part), -1, -1)
            for part in (self.heads, self.mlps)
        )
        return dataclasses.replace(self, heads=heads, mlps=mlps)

    def to(self, device: torch.device) -> "States":
        return dataclasses.replace(
            self, embeds=self.embeds.to(device), heads=self.heads.to(device), mlps=self.mlps.to(device)
        )

    def mean(self) -> "States":
        """One vector per writer, averaged over all tokens in float32 or better (mean ablation)."""
        return dataclasses.replace(
            self, embeds=_token_mean(self.embeds), heads=_token_mean(self.heads), mlps=_token_mean(self.mlps)
        )

    def zero(self, output_bias: str) -> "States":
        """Every writer replaced by zero (zero ablation).

        Args:
            output_bias: ``split`` (1/H of ``b_O`` belongs to each head and goes with it) or ``kept``.
        """
        return States(
            torch.zeros_like(self.embeds[:, :1]),
            torch.zeros_like(self.heads[:, :1]),
            torch.zeros_like(self.mlps[:, :1]),
            has_output_bias=output_bias == "kept",
        )


@dataclass(frozen=True)
class StatesShape:
    """How the states of one token lie in a row of ``F`` numbers: embeddings, then heads, then MLPs, layer by layer.

    Args:
        embeds, heads, mlps: shapes ``(E, d)``, ``(L, H * d_head)``, ``(L, d)`` of one token's states.
    """

    embeds: tuple[int, int]
    heads: tuple[int, int]
    mlps: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, states: States) -> "StatesShape":
        embeds, heads, mlps = ((part.shape[0], part.shape[2]) for part in (states.embeds, states.heads, states.mlps))
        return cls(embeds, heads, mlps, states.embeds.dtype)

    @property
    def sizes(self) -> list[int]:
        """Numbers of each part in a row."""
        return [count * width for count, width in (self.embeds, self.heads, self.mlps)]

    @property
    def token_bytes(self) -> int:
        """Bytes of one row."""
        return sum(self.sizes) * self.dtype.itemsize

    def empty(self, tokens: int, device: torch.device, pinned: bool = False) -> Tensor:
        """Rows of some tokens, ``[T, F]``, not initialised."""
        return torch.empty(tokens, sum(self.sizes), dtype=self.dtype, device=device, pin_memory=pinned)

    def view(self, rows: Tensor) -> States:
        """The states that rows ``[T, F]`` hold; nothing is copied."""
        embeds, heads, mlps = (
            part.unflatten(1, shape).transpose(0, 1)
            for part, shape in zip(rows.split(self.sizes, dim=1), (self.embeds, self.heads, self.mlps), strict=True)
        )
        return States(embeds, heads, mlps)

    def write(self, states: States, rows: Tensor) -> None:
        """Copy states into rows ``[T, F]``."""
        to = self.view(rows)
        for own, part in ((to.embeds, states.embeds), (to.heads, states.heads), (to.mlps, states.mlps)):
            own.copy_(part)


def _token_mean(values: Tensor) -> Tensor:
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    return wide.mean(1, keepdim=True).to(values.dtype)


def attend(
    attention: Attention,
    projected: tuple[Tensor, ...],
    rotary: Rotary,
    packing: Packing,
    causal: bool,
    head_to_kv: Tensor | None = None,
    alive: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One block's attention between the projections in front of it and the one behind it.

    Args:
        projected: queries ``[H, T, d_head]``, keys and values ``[KV, T, d_head]``.
        head_to_kv: key/value head of every head, ``[H]``; None: consecutive groups of equal size.
        alive: int32 ``[H]``, 0 for heads whose output nothing needs, nor the gradients of their operands, which may
            hold anything; None: all are needed.
        backend: which kernels to use.

    Returns:
        ``[T, H * d_head]``.
    """
    query, key, value = projected
    if packing.is_short and runs_packed(query, key, alive, backend):
        return packed_attention(
            query,
            key,
            value,
            packing.starts,
            scale=attention.scale,
            longest=packing.longest,
            kv_of_head=None if head_to_kv is None else head_to_kv.cpu(),
            alive=alive,
            rotary=rotary,
            causal=causal,
            window=attention.window,
            backend=backend,
        )
    if alive is not None:  # what the keys of a group get of such a head must be 0
        query = torch.where(alive[:, None, None] != 0, query, 0)
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    if head_to_kv is not None:
        key, value = key.index_select(0, head_to_kv), value.index_select(0, head_to_kv)
    return packing.attention(query, key, value, attention.scale, causal, attention.window)


def output_projection(attention: Attention) -> Tensor:
    """All heads' output weights as one ``[H * d_head, d]`` view."""
    return attention.out_weight.flatten(0, 1)


@torch.no_grad()
def run_unmasked(anatomy: Anatomy, token_ids: Tensor, packing: Packing, backend: str = "auto") -> tuple[States, Tensor]:
    """The plain model on packed tokens ``[T]``: what every writer wrote, and the final stream ``[T, d]``."""
    embeds = anatomy.embed(token_ids, packing.position_ids)
    rotary = None if anatomy.rotary is None else anatomy.rotary(packing.position_ids)
    stream = torch.stack(embeds).sum(0)
    heads, mlps = [], []
    for block in anatomy.blocks:
        attention = block.attention
        x = attention.norm(stream)[None]
        projected = tuple(part(x) for part in attention.projections)
        out = attend(attention, projected, rotary, packing, anatomy.causal, backend=backend)
        stream = stream + out @ output_projection(attention)
        if attention.out_bias is not None:
            stream = stream + attention.out_bias
        mlp = block.mlp(block.mlp_norm(stream), backend=backend)
        stream = stream + mlp
        heads.append(out)
        mlps.append(mlp)
    return States(torch.stack(embeds), torch.stack(heads), torch.stack(mlps)), stream

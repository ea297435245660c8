"""A block with some of its components removed, computing only what is kept and only where it is needed."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcircuit.extraction.prompts import Prompts, Rows
from fastcircuit.models.anatomy import Attention, Block, Projection
from fastcircuit.models.states import rotate
from fastcircuit.submodel.kept import Constants


@dataclass(frozen=True)
class LayerConstants:
    """What one block's components write when removed: heads ``[P, H, d_head]``, mlp ``[P, d]``; see Constants."""

    heads: Tensor
    mlp: Tensor
    has_output_bias: bool

    @classmethod
    def of(cls, constants: Constants, layer: int) -> "LayerConstants":
        return cls(constants.heads[layer].transpose(0, 1), constants.mlps[layer], constants.has_output_bias)


def at_positions(table: Tensor, rows: Rows) -> Tensor:
    """The entries ``[n or 1, ...]`` of a constant ``[P, ...]`` at these rows."""
    return table if len(table) == 1 else table.index_select(0, rows.positions)


class Heads:
    """Some heads of one attention, their projections side by side in one matrix each.

    Args:
        kept: bool ``[H]``, at least one.
    """

    def __init__(self, attention: Attention, kept: np.ndarray, causal: bool) -> None:
        self.attention, self.causal = attention, causal
        device = attention.out_weight.device
        index = torch.from_numpy(np.flatnonzero(kept)).to(device)
        groups, self.group_of = torch.unique(
            index // (attention.query.heads // attention.key.heads), return_inverse=True
        )
        self.count, self.num_groups = len(index), len(groups)
        self.query = _Fused(attention.query, index)
        self.key, self.value = _Fused(attention.key, groups), _Fused(attention.value, groups)

    def __call__(self, stream: Tensor, prompts: Prompts, rows: Rows) -> Tensor:
        """Before the output projection, ``[C, n, heads, d_head]`` at ``rows``, from all tokens, ``[C, T, d]``."""
        batch = len(stream)
        x = self.attention.norm(stream)
        query = self.query(rows.narrow(x, prompts.every))
        key, value = self.key(x), self.value(x)
        if rows.rotary is not None and prompts.every.rotary is not None:
            query, key = rotate(query, *rows.rotary), rotate(key, *prompts.every.rotary)
        if self.num_groups != self.count:
            key, value = (part.index_select(1, self.group_of) for part in (key, value))
        out = F.scaled_dot_product_attention(
            rows.to_sequences(query.flatten(0, 1)),
            prompts.every.to_sequences(key.flatten(0, 1)),
            prompts.every.to_sequences(value.flatten(0, 1)),
            attn_mask=rows.visible(self.causal, self.attention.window),
            scale=self.attention.scale,
        )
        return rows.to_rows(out).unflatten(1, (batch, -1)).transpose(0, 1)


class _Fused:
    """Some heads of a projection as one matrix: ``[C, n, d] -> [C, heads, n, d_head]``."""

    def __init__(self, projection: Projection, heads: Tensor) -> None:
        self.heads = len(heads)
        self.weight = projection.weight.index_select(0, heads).transpose(0, 1).flatten(1).contiguous()
        self.bias = None if projection.bias is None else projection.bias.index_select(0, heads).flatten()

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.T, self.bias)
        return out.unflatten(2, (self.heads, -1)).transpose(1, 2)


class PrunedBlock:
    """One block without the components that were removed.

    Args:
        removed: bool ``[H + 1]``: the heads, then the MLP.
    """

    def __init__(self, block: Block, constants: LayerConstants, removed: np.ndarray, causal: bool) -> None:
        kept = ~removed[:-1]
        self.heads = Heads(block.attention, kept, causal) if kept.any() else None
        self.mlp = None if removed[-1] else block
        self.mlp_constant = constants.mlp
        attention, device = block.attention, constants.heads.device
        on, off = (torch.from_numpy(np.flatnonzero(which)).to(device) for which in (kept, ~kept))
        self.out_weight = attention.out_weight.index_select(0, on).flatten(0, 1)
        self.constant = output(constants.heads.index_select(1, off), attention.out_weight.index_select(0, off))
        if attention.out_bias is not None:
            share = 1.0 if constants.has_output_bias else float(kept.mean())
            self.constant = self.constant + share * attention.out_bias

    @property
    def attends(self) -> bool:
        return self.heads is not None

    def __call__(self, stream: Tensor, prompts: Prompts, rows_in: Rows, rows_out: Rows) -> Tensor:
        """The stream behind this block at ``rows_out``, ``[C, n_out, d]``, from that in front of it at ``rows_in``.

        With attention, ``rows_in`` must be all tokens.
        """
        after = rows_out.narrow(stream, rows_in) + at_positions(self.constant, rows_out)
        if self.heads is not None:
            out = self.heads(stream, prompts, rows_out)
            after = after + out.flatten(2) @ self.out_weight
        if self.mlp is None:
            return after + at_positions(self.mlp_constant, rows_out)
        return after + self.mlp.mlp(self.mlp.mlp_norm(after))


def output(heads: Tensor, weight: Tensor) -> Tensor:
    """The output projection of heads ``[..., H, d_head]`` through ``[H, d_head, d]``: ``[..., d]``."""
    return heads.flatten(-2) @ weight.flatten(0, 1)


class Suffix:
    """The pruned blocks above some layer, lowest first."""

    def __init__(self, blocks: tuple[PrunedBlock, ...] = (), removed: tuple[np.ndarray, ...] = ()) -> None:
        self.blocks = blocks
        self.key = b"".join(row.tobytes() for row in removed)
        self._removed = removed
        attending = [index for index, block in enumerate(blocks) if block.attends]
        self.last_attention = max(attending, default=-1)

    def below(self, block: PrunedBlock, removed: np.ndarray) -> "Suffix":
        """With one more block, in front."""
        return Suffix((block, *self.blocks), (removed, *self._removed))

    def rows(self, prompts: Prompts) -> Rows:
        """Where its input is needed: only at the answers when no attention is left to look elsewhere."""
        return prompts.every if self.last_attention >= 0 else prompts.answers

    def __call__(self, stream: Tensor, prompts: Prompts) -> Tensor:
        """The final stream at the answers, ``[C, N, d]``, from the input at :meth:`rows`, ``[C, n, d]``.

        The last attention asks its queries, and everything above it runs, at the answers only.
        """
        rows = self.rows(prompts)
        for index, block in enumerate(self.blocks):
            after = prompts.every if index < self.last_attention else prompts.answers
            stream = block(stream, prompts, rows, after)
            rows = after
        return stream

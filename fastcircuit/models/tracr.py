"""Tracr: no norms, a table of positions, attention that need not be causal, an unembedding with a bias."""

from typing import Any

from torch import Tensor, nn

from fastcircuit.models.anatomy import Anatomy, Attention, Block, NoNorm, linear_heads, linear_output
from fastcircuit.models.mlp import Mlp, Parts, linear


def tracr(model: Any) -> Anatomy:
    """The anatomy of a ``TracrLMHeadModel``."""

    def embed(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return model.tok_embed(token_ids), model.pos_embed(positions)

    return Anatomy(
        embed=embed,
        blocks=tuple(_block(block) for block in model.blocks),
        final_norm=NoNorm(),
        unembed=model.lm_head,
        causal=model.config.causal,
    )


def _block(block: Any) -> Block:
    attention = block.attention
    query, key, value = (
        linear_heads(part, attention.heads) for part in (attention.query, attention.key, attention.value)
    )
    return Block(
        attention=Attention(
            norm=NoNorm(),
            query=query,
            key=key,
            value=value,
            out_weight=linear_output(attention.output, attention.heads),
            out_bias=attention.output.bias,
            scale=attention.scale,
        ),
        mlp_norm=NoNorm(),
        mlp=_mlp(block.mlp),
    )


def _mlp(mlp: Any) -> Mlp:
    return Mlp(mlp, Parts(None, linear(mlp.up), linear(mlp.down), nn.ReLU(), tuple(mlp.modules())))

"""GPT-2: learned positions, LayerNorm, fused q/k/v in a transposed linear layer."""

from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from fastcircuit.errors import InputError
from fastcircuit.models.anatomy import Anatomy, Attention, Block, Projection, layer_norm
from fastcircuit.models.mlp import Mlp, Parts
from fastcircuit.ops import Affine


def gpt2(model: Any) -> Anatomy:
    """The anatomy of a ``GPT2LMHeadModel``."""
    if model.config.add_cross_attention:
        raise InputError("a GPT-2 with cross-attention is not supported; set add_cross_attention=False")
    body = model.transformer

    def embed(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return body.wte(token_ids), body.wpe(positions)

    return Anatomy(
        embed=embed,
        blocks=tuple(_block(block) for block in body.h),
        final_norm=layer_norm(body.ln_f),
        unembed=model.lm_head,
    )


def _block(block: Any) -> Block:
    attention = block.attn
    heads, d_head = attention.num_heads, attention.head_dim
    qkv = attention.c_attn.weight.view(-1, 3, heads, d_head).permute(1, 2, 0, 3)
    bias = attention.c_attn.bias.view(3, heads, 1, d_head)
    query, key, value = (Projection(qkv[part], bias[part]) for part in range(3))
    return Block(
        attention=Attention(
            norm=layer_norm(block.ln_1),
            query=query,
            key=key,
            value=value,
            out_weight=attention.c_proj.weight.view(heads, d_head, -1),
            out_bias=attention.c_proj.bias,
            scale=attention.scaling,
        ),
        mlp_norm=layer_norm(block.ln_2),
        mlp=_mlp(block.mlp),
    )


def _mlp(mlp: Any) -> Mlp:
    """The block's MLP; GPT-2's own activation, written out in Hugging Face, as the one operation it is."""
    act = nn.GELU(approximate="tanh") if isinstance(mlp.act, NewGELUActivation) else mlp.act
    layers = (mlp.c_fc, mlp.c_proj)

    def function(x: Tensor) -> Tensor:
        out: Tensor = mlp.c_proj(act(mlp.c_fc(x)))
        return out

    if type(mlp) is not GPT2MLP or not all(type(layer) is Conv1D for layer in layers):
        return Mlp(function)
    up, down = (Affine(layer.weight, layer.bias) for layer in layers)
    return Mlp(function, Parts(None, up, down, act, (*layers, act)))

"""Llama: rotary positions, RMSNorm, grouped-query attention, gated MLP."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from fastcircuit.models.anatomy import Anatomy, Attention, Block, linear_heads, linear_output, rms_norm
from fastcircuit.models.mlp import Mlp, Parts, linear


def llama(model: Any, windows: Sequence[int | None] | None = None) -> Anatomy:
    """The anatomy of a ``LlamaForCausalLM``, or of a model with the same parts (mistral.py, qwen2.py).

    Args:
        windows: how many tokens each layer sees back; None: all of them, in every layer.
    """
    body = model.model
    if windows is None:
        windows = [None] * len(body.layers)

    def embed(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return (body.embed_tokens(token_ids),)

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = body.rotary_emb(body.embed_tokens.weight, positions[None])
        return cos[0], sin[0]

    return Anatomy(
        embed=embed,
        blocks=tuple(_block(*layer_and_window) for layer_and_window in zip(body.layers, windows, strict=True)),
        final_norm=rms_norm(body.norm.weight, body.norm.variance_epsilon),
        unembed=model.lm_head,
        rotary=rotary,
    )


def _block(layer: Any, window: int | None) -> Block:
    attention, norm, mlp_norm = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    heads = attention.config.num_attention_heads
    kv_heads = attention.config.num_key_value_heads
    return Block(
        attention=Attention(
            norm=rms_norm(norm.weight, norm.variance_epsilon),
            query=linear_heads(attention.q_proj, heads),
            key=linear_heads(attention.k_proj, kv_heads),
            value=linear_heads(attention.v_proj, kv_heads),
            out_weight=linear_output(attention.o_proj, heads),
            out_bias=attention.o_proj.bias,
            scale=attention.scaling,
            window=window,
        ),
        mlp_norm=rms_norm(mlp_norm.weight, mlp_norm.variance_epsilon),
        mlp=_mlp(layer.mlp),
    )


def _mlp(mlp: Any) -> Mlp:
    """The gated MLP: by its parts too where it is the class of Hugging Face's and they are plain."""
    layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if type(mlp) not in (LlamaMLP, MistralMLP, Qwen2MLP) or not all(type(layer) is nn.Linear for layer in layers):
        return Mlp(mlp)
    gate, up, down = (linear(layer) for layer in layers)
    return Mlp(mlp, Parts(gate, up, down, mlp.act_fn, tuple(mlp.modules())))

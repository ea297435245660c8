"""Tiny random models of every supported architecture, with every feature switched on somewhere."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastcircuit.models.modeling_tracr import TracrConfig, TracrLMHeadModel

_GPT2 = {"vocab_size": 41, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
_LLAMA = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_TRACR = {
    "tokens": [f"t{token}" for token in range(41)],
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 5,
    "intermediate_size": 30,
    "max_position_embeddings": 16,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

TINY = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_GPT2)),
    "gpt2-untied-by-layer": (
        GPT2LMHeadModel,
        GPT2Config(**_GPT2, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, n_inner=20),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**_LLAMA)),
    "llama-biases-head-dim": (
        LlamaForCausalLM,
        LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True, head_dim=10, tie_word_embeddings=True),
    ),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**_LLAMA, rope_parameters=_LLAMA3_ROPE)),
    "llama-linear-rope-mha": (
        LlamaForCausalLM,
        LlamaConfig(
            **{**_LLAMA, "num_key_value_heads": 4},
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        ),
    ),
    "mistral-window": (MistralForCausalLM, MistralConfig(**_LLAMA, sliding_window=3)),
    "qwen2-mixed-window": (
        Qwen2ForCausalLM,
        Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "tracr": (TracrLMHeadModel, TracrConfig(**_TRACR)),
    "tracr-causal": (TracrLMHeadModel, TracrConfig(**_TRACR, causal=True)),
}


def tiny_model(name, dtype=torch.float64, seed=0):
    """A tiny random model; biases and norm weights are random too, so that forgetting one shows."""
    kind, config = TINY[name]
    torch.manual_seed(seed)
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)
    return model

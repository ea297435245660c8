"""Qwen2: Llama with q/k/v biases (found on the layers themselves) and a sliding window in some layers."""

from typing import Any

from fastcircuit.models.anatomy import Anatomy
from fastcircuit.models.llama import llama


def qwen2(model: Any) -> Anatomy:
    """The anatomy of a ``Qwen2ForCausalLM``."""
    config = model.config
    return llama(
        model,
        windows=[config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types],
    )

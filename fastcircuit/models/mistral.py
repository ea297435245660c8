"""Mistral: Llama with the same sliding window in every layer."""

from typing import Any

from fastcircuit.models.anatomy import Anatomy
from fastcircuit.models.llama import llama


def mistral(model: Any) -> Anatomy:
    """The anatomy of a ``MistralForCausalLM``."""
    return llama(model, windows=[model.config.sliding_window] * model.config.num_hidden_layers)

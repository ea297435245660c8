"""The models that are measured: their shapes, with random weights, and random prompts."""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastcircuit.graph import Graph
from fastcircuit.tasks.task import Examples, Pair

GIB = 2**30
MOST = {"cpu": 4 * GIB, "cuda": 64 * GIB}


@dataclass(frozen=True)
class Shape:
    """A model's shape and a batch: ``batch`` prompts of ``tokens`` tokens."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    batch: int = 4
    tokens: int = 64
    architecture: str = "gpt2"
    kv_heads: int | None = None
    mlp_width: int | None = None

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        if self.architecture == "gpt2":
            return GPT2Config(
                n_layer=self.layers,
                n_head=self.heads,
                n_embd=self.width,
                vocab_size=self.vocabulary,
                n_positions=max(self.tokens, 64),
                bos_token_id=None,
                eos_token_id=None,
            )
        return LlamaConfig(
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            hidden_size=self.width,
            intermediate_size=self.mlp_width or 4 * self.width,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(self.tokens, 64),
        )

    @functools.cached_property
    def graph(self) -> Graph:
        return Graph.from_config(self.config)

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} heads, width {self.width}, batch {self.batch} x {self.tokens}"


GPT2_SMALL = Shape()
SHAPES = {
    "stories260K": Shape(5, 8, 64, 512, 16, 20, "llama", kv_heads=4, mlp_width=172),
    "GPT-2 small": GPT2_SMALL,
    "GPT-2 medium": Shape(layers=24, heads=16, width=1024),
    "Llama-7B": Shape(32, 32, 4096, 32000, 1, 64, "llama", mlp_width=11008),
    "Llama-13B": Shape(40, 40, 5120, 32000, 1, 64, "llama", mlp_width=13824),
}


def random_model(shape: Shape, device: str = "cpu") -> Any:
    """A Hugging Face model of this shape with random weights, float32."""
    torch.manual_seed(0)
    make = GPT2LMHeadModel if shape.architecture == "gpt2" else LlamaForCausalLM
    return make(shape.config).eval().to(device)


def random_ids(shape: Shape, seed: int = 0) -> torch.Tensor:
    """Random tokens ``[batch, tokens]``, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (shape.batch, shape.tokens), generator=generator)


def random_pairs(shape: Shape) -> Examples:
    """``batch`` pairs of random tokens, all ``tokens`` long, the answer predicted at the last position."""
    ids = torch.randint(
        shape.vocabulary, (2, shape.batch, shape.tokens + 1), generator=torch.Generator().manual_seed(0)
    )
    clean, corrupted = ids.tolist()
    last = shape.tokens - 1
    return Examples.from_pairs(
        [Pair(tuple(a[:-1]), tuple(b[:-1]), (last,), (a[-1],), (b[-1],)) for a, b in zip(clean, corrupted, strict=True)]
    )


def room(device: str) -> int:
    """Bytes that a case may take: of what the device has, not of what is free, so that cases keep their names."""
    if device == "cuda":
        return min(torch.cuda.mem_get_info()[1] // 2, MOST["cuda"])
    try:
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, MOST["cpu"])
    except (AttributeError, ValueError):  # Windows has no sysconf
        return MOST["cpu"]

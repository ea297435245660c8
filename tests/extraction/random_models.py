"""Hypothesis strategies: tiny random models of random shapes, and random prompts for them."""

import torch
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastcircuit import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Pair, Task
from tests.models.tiny import tiny_model

VOCABULARY = 23
LONGEST = 9


@st.composite
def models(draw):
    """A MaskedCausalLM in float64: GPT-2, Llama with grouped heads, or Qwen2 with biases and windows."""
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads, d_head = kv_heads * draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    kind = draw(st.sampled_from(["gpt2", "llama", "qwen2"]))
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LONGEST, n_embd=heads * d_head, n_layer=layers, n_head=heads
        )
        return MaskedCausalLM(random_model(GPT2LMHeadModel(config), draw(st.integers(0, 10**6))))
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "max_position_embeddings": LONGEST,
    }
    if kind == "llama":
        architecture, config = LlamaForCausalLM, LlamaConfig(**shape, attention_bias=draw(st.booleans()))
    else:
        window = draw(st.integers(1, 4))
        config = Qwen2Config(**shape, use_sliding_window=True, sliding_window=window, max_window_layers=1)
        architecture = Qwen2ForCausalLM
    return MaskedCausalLM(random_model(architecture(config), draw(st.integers(0, 10**6))))


def sensitive(name):
    """A tiny model of tests/models whose answers feel the loss of a component."""
    return random_model(tiny_model(name), 0)


def random_model(model, seed):
    """``model`` in float64 with noise on every parameter, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.4)
    return model


@st.composite
def tasks(draw, equal_length=False):
    """A task of random prompts, several answers each; with padding unless ``equal_length``."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    length = draw(st.integers(1, LONGEST)) if equal_length else None
    sizes = {"train": draw(st.integers(2, 9)), "test": draw(st.integers(1, 3))}
    return random_task(sizes, length, generator)


def random_task(sizes, length=None, generator=None, vocabulary=VOCABULARY, longest=LONGEST):
    """Random pairs of ``length`` tokens, or of 1 to ``longest``."""
    generator = generator or torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def pair():
        tokens = length or number(1, longest)
        clean, corrupted = torch.randint(vocabulary, (2, tokens), generator=generator).tolist()
        positions = sorted({number(0, tokens - 1) for _ in range(2)})
        answers = [number(0, vocabulary - 1) for _ in positions]
        return Pair(tuple(clean), tuple(corrupted), tuple(positions), tuple(answers), (-100,) * len(positions))

    splits = {name: Examples.from_pairs([pair() for _ in range(size)]) for name, size in sizes.items()}
    return Task("random", splits, None, "Random pairs.")

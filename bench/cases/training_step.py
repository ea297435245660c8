"""One Edge Pruning training step: ours and the published method's, on the same random GPT-2 and the same batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.settings import Settings
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Pair

Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A model's shape and the batch of a step."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    batch: int = 4
    tokens: int = 64


GPT2_SMALL = Shape()


def random_model(shape: Shape) -> GPT2LMHeadModel:
    """A GPT-2 of this shape with random weights, float32."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        vocab_size=shape.vocabulary,
        n_positions=shape.tokens,
    )
    return GPT2LMHeadModel(config).eval()


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


def fastcircuit_step(model: GPT2LMHeadModel, shape: Shape, recompute: bool | None = None) -> Step:
    """Our step at its densest: every mask starts on, so that nothing can be skipped."""
    masked = MaskedCausalLM(model, recompute=recompute)
    settings = Settings(steps=10**6, batch_size=shape.batch, initial_log_alpha=10.0, sparsity_warmup=10**6)
    return EdgePruning(Reference(masked, random_pairs(shape)), 1000, settings).step


def published_step(model: GPT2LMHeadModel, shape: Shape) -> Step:
    """The published method's step (see bench/baselines)."""
    published, pairs = PublishedEdgePruning(model, steps=10**6), random_pairs(shape)
    batch = {
        "input_ids": pairs.input_ids,
        "corrupted_input_ids": pairs.corrupted_input_ids,
        "start": torch.full((shape.batch,), shape.tokens - 1),
        "end": torch.full((shape.batch,), shape.tokens),
    }
    return lambda: published.training_step(batch)


STEPS: dict[str, Callable[[GPT2LMHeadModel, Shape], Step]] = {
    "fastcircuit": fastcircuit_step,
    "published": published_step,
}

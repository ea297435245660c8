"""Algorithm 1 on a random GPT-2: ours, and the published loop on the same prompts."""

import torch
from transformers import GPT2LMHeadModel

from bench.baselines.circuit_extraction import PublishedExtraction
from bench.cases.training_step import Shape, random_pairs
from fastcircuit.extraction.prune import Sweep, halves, sweep
from fastcircuit.tasks.task import Task

FACTOR = 3.0
LOGIT_SPREAD = 3.0
GPT2_SMALL_150 = Shape(batch=300, tokens=15)


def random_task(shape: Shape) -> Task:
    """Random prompts of equal length, answered at the last position; half for means, half to measure on."""
    train = random_pairs(shape)
    return Task("random", {"train": train, "test": train.select(slice(0, shape.batch // 10))}, None, "Random tokens.")


def extract(model: GPT2LMHeadModel, shape: Shape, thresholds: list[float]) -> Sweep:
    """Ours: mean ablation per position, heads and MLPs."""
    return sweep(model, random_task(shape), thresholds, ablation="mean-positional")


def published(model: GPT2LMHeadModel, shape: Shape, threshold: float) -> PublishedExtraction:
    """The published loop at its beginning; ``step()`` tests one candidate."""
    patching, validation = halves(random_task(shape))
    return PublishedExtraction(model, patching.input_ids, validation.input_ids, threshold)


def opinionated(model: GPT2LMHeadModel, factor: float = FACTOR) -> GPT2LMHeadModel:
    """The model with block weights ``factor`` times larger, and logits with a standard deviation of LOGIT_SPREAD.

    A model that is drawn at random predicts much the same for every prompt and can do without all its components;
    this one has components that matter, as a trained model has.
    """
    with torch.no_grad():
        for block in model.transformer.h:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(factor)
        norm = model.lm_head.weight.pow(2).sum(1).mean().sqrt()
        model.transformer.ln_f.weight.fill_(LOGIT_SPREAD / float(norm))
    return model

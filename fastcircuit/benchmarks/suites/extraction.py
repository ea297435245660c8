"""Algorithm 1 on a random GPT-2: ours, and the published loop on the same prompts."""

import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from transformers import GPT2LMHeadModel

from fastcircuit.benchmarks.baselines.circuit_extraction import PublishedExtraction
from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.benchmarks.models import Shape, random_model, random_pairs
from fastcircuit.extraction.prune import THRESHOLDS, Sweep, halves, sweep
from fastcircuit.tasks.task import Task

FACTOR = 3.0
LOGIT_SPREAD = 3.0
GPT2_SMALL_150 = Shape(batch=300, tokens=15)
QUICK = Shape(layers=6, heads=8, width=256, vocabulary=4096, batch=80, tokens=15)
SKIPPED = 5  # all 30 thresholds take ten minutes
PROOF = Shape(layers=3, heads=4, width=32, vocabulary=101, batch=20, tokens=9)


def cases(target: Target) -> Iterator[Case]:
    name, shape = ("6 layers", QUICK) if target.quick else ("GPT-2 small", GPT2_SMALL_150)
    for kind, thresholds in (("as drawn", (1e-3,)), ("opinionated", (1e-1,)), ("as drawn", THRESHOLDS[::SKIPPED])):
        if len(thresholds) > 1 and target.quick:
            continue
        what = f"threshold {thresholds[0]:g}" if len(thresholds) == 1 else f"{len(thresholds)} thresholds"
        yield Case(
            suite="extraction",
            name="Algorithm 1, mean ablation",
            shape=f"{name} {kind}, {shape.batch // 2} + {shape.batch // 2} prompts of {shape.tokens}, {what}",
            dtype="float32",
            device=target.device,
            setup=functools.partial(_setup, shape, kind, target.device),
            variants={
                "fastcircuit": functools.partial(fastcircuit, shape, thresholds),
                "published": functools.partial(published_loop, shape, thresholds),
            },
            baseline="published",
            counts_memory=not target.quick and len(thresholds) == 1,  # more thresholds take as much, one after another
        )


def _setup(shape: Shape, kind: str, device: str) -> GPT2LMHeadModel:
    model = random_model(shape, device)
    return opinionated(model) if kind == "opinionated" else model


def fastcircuit(shape: Shape, thresholds: Sequence[float], model: GPT2LMHeadModel) -> Variant:
    return Variant(lambda: extract(model, shape, list(thresholds)), decides_alike)


def published_loop(shape: Shape, thresholds: Sequence[float], model: GPT2LMHeadModel) -> Variant:
    """The published loop costs the same for every candidate, so it is timed one candidate at a time."""
    own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})  # it hooks the model
    loop: list[PublishedExtraction] = []

    def call() -> None:
        if not loop or not loop[0].candidates:
            for finished in loop:
                finished.close()
            loop[:] = [published(own, shape, thresholds[len(thresholds) // 2])]
        loop[0].step()

    call()  # the means and the first candidate are not timed
    return Variant(call, decides_alike, parts=len(thresholds) * shape.layers * (shape.heads + 1))


@functools.cache
def decides_alike() -> str | None:
    """The gate: ours and the published loop remove the same components of a small model, in float64."""
    model = opinionated(random_model(PROOF)).double()
    for threshold in (1e-3, 1e-2, 1e-1):
        (ours,) = extract(model, PROOF, [threshold]).points
        loop = published(model, PROOF, threshold)
        for _ in range(PROOF.layers * (PROOF.heads + 1)):
            loop.step()
        loop.close()
        removed = [
            (candidate.layer, PROOF.heads if candidate.head is None else candidate.head)
            for candidate in ours.history
            if candidate.removed
        ]
        if removed != loop.removed:
            return f"at threshold {threshold:g} one removes {removed}, the other {loop.removed}"
    return None


def random_task(shape: Shape) -> Task:
    """Random prompts of equal length, answered at the last position; half for means, half to measure on."""
    train = random_pairs(shape)
    return Task("random", {"train": train, "test": train.select(slice(0, shape.batch // 10))}, None, "Random tokens.")


def extract(model: GPT2LMHeadModel, shape: Shape, thresholds: list[float]) -> Sweep:
    """Ours: mean ablation per position, heads and MLPs."""
    return sweep(model, random_task(shape), thresholds, ablation="mean-positional")


def published(model: GPT2LMHeadModel, shape: Shape, threshold: float) -> PublishedExtraction:
    """The published loop at its beginning; ``step()`` tests one candidate."""
    patching, validation = (half.input_ids.to(model.device) for half in halves(random_task(shape)))
    return PublishedExtraction(model, patching, validation, threshold)


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

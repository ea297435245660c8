"""EAP, EAP-IG and ACDC at GPT-2 small shape and on stories260K: ours, and what they are compared with."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from bench.baselines.eap_ig import Metric, PublishedAttribution
from bench.cases.training_step import Shape, random_pairs
from fastcircuit.discovery.attribution import attribute
from fastcircuit.discovery.scores import Scores
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Task

SHAPE = Shape(batch=8, tokens=16)
STEPS = 5
METHODS = ("eap", "eap-ig")


def task_of(shape: Shape) -> Task:
    """``batch`` pairs of random tokens with one answer and one distractor at the last position."""
    return Task("random pairs", {"train": random_pairs(shape)}, None, "random tokens")


def ours(model: GPT2LMHeadModel, shape: Shape, method: str) -> Callable[[], Scores]:
    """Scores of every edge: EAP of the logit difference, EAP-IG of the KL."""
    masked, task = MaskedCausalLM(model, "joint"), task_of(shape)
    return lambda: attribute(masked, task, method, ig_steps=STEPS)


def published(model: GPT2LMHeadModel, shape: Shape, method: str) -> Callable[[], np.ndarray]:
    """The same by the published method's cost model (see bench/baselines)."""
    examples = random_pairs(shape)
    loop = PublishedAttribution(model, kl_divergence if method == "eap-ig" else logit_difference(examples))
    ids = examples.input_ids, examples.corrupted_input_ids
    if method == "eap":
        return lambda: loop.edge_scores(loop.eap(*ids))
    return lambda: loop.edge_scores(loop.eap_ig(*ids, STEPS))


CALLS: dict[str, Callable[[GPT2LMHeadModel], Callable[[], object]]] = {
    f"{method}-{name}": lambda model, make=make, method=method: make(model, SHAPE, method)
    for method in METHODS
    for name, make in (("ours", ours), ("published", published))
}


def logit_difference(examples: Examples) -> Metric:
    """Wrong minus right logit at the last position, summed over examples."""
    right, wrong = (tokens[:, -1:] for tokens in (examples.answers, examples.distractors))

    def metric(logits: Tensor, clean_logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, wrong) - last.gather(1, right)).sum()

    return metric


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(clean || this) at the last position, nats, summed over examples."""
    found, target = (torch.log_softmax(values[:, -1], -1) for values in (logits, clean_logits))
    return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)

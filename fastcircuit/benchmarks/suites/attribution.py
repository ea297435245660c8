"""Scores of every edge beside the published EAP-IG code's way; ACDC beside a full forward pass for every edge."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastcircuit.benchmarks.baselines.eap_ig import Metric, PublishedAttribution
from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.benchmarks.models import Shape, random_model, random_pairs
from fastcircuit.benchmarks.suites.extraction import opinionated
from fastcircuit.discovery.acdc import acdc
from fastcircuit.discovery.attribution import attribute
from fastcircuit.discovery.scores import Scores
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks import load_task
from fastcircuit.tasks.task import Examples, Task

GPT2_SMALL = Shape(batch=8, tokens=16)
QUICK = Shape(layers=4, heads=8, width=256, vocabulary=4096, batch=8, tokens=16)
PROOF = Shape(layers=3, heads=4, width=32, vocabulary=101, batch=5, tokens=9)
STEPS = 5
METHODS = ("eap", "eap-ig")
SHARES = (0.001, 0.01)  # ACDC's thresholds, of the KL of the circuit without edges


def cases(target: Target) -> Iterator[Case]:
    name, shape = ("4 layers", QUICK) if target.quick else ("GPT-2 small", GPT2_SMALL)
    for method in METHODS:
        yield Case(
            suite="attribution",
            name=method,
            shape=f"{name}: {shape}",
            dtype="float32",
            device=target.device,
            setup=functools.partial(random_model, shape, target.device),
            variants={
                "fastcircuit": functools.partial(scoring, ours, shape, method),
                "published": functools.partial(scoring, published, shape, method),
            },
            baseline="published",
            counts_memory=not target.quick,
        )
    for share in SHARES[-1:] if target.quick else SHARES:
        yield Case(
            suite="attribution",
            name="ACDC",
            shape=f"stories260K: pronoun-212, threshold {share:g} of the KL without edges",
            dtype="float32",
            device=target.device,
            setup=functools.partial(Stories, share, target.device),
            variants={
                "fastcircuit": Stories.acdc,
                "full passes": Stories.full_pass,
                "published full passes": Stories.published_full_pass,
            },
            baseline="published full passes",
            counts_memory=not target.quick,
        )


def scoring(make: Callable[..., Callable[[], object]], shape: Shape, method: str, model: GPT2LMHeadModel) -> Variant:
    return Variant(make(model, shape, method), functools.partial(scores_alike, method))


def task_of(shape: Shape) -> Task:
    """``batch`` pairs of random tokens with one answer and one distractor at the last position."""
    return Task("random pairs", {"train": random_pairs(shape)}, None, "random tokens")


def ours(model: GPT2LMHeadModel, shape: Shape, method: str) -> Callable[[], Scores]:
    """Scores of every edge: EAP of the logit difference, EAP-IG of the KL."""
    masked, task = MaskedCausalLM(model, "joint"), task_of(shape)
    return lambda: attribute(masked, task, method, ig_steps=STEPS)


def published(model: GPT2LMHeadModel, shape: Shape, method: str) -> Callable[[], np.ndarray]:
    """The same by the published method's cost model."""
    examples = random_pairs(shape)
    loop = PublishedAttribution(model, kl_divergence if method == "eap-ig" else logit_difference(examples))
    ids = examples.input_ids.to(model.device), examples.corrupted_input_ids.to(model.device)
    if method == "eap":
        return lambda: loop.edge_scores(loop.eap(*ids))
    return lambda: loop.edge_scores(loop.eap_ig(*ids, STEPS))


@functools.cache
def scores_alike(method: str) -> str | None:
    """The gate: ours and the published way score the edges of a small model the same, in float64."""
    model = opinionated(random_model(PROOF)).double()
    expected, found = published(model, PROOF, method)(), ours(model, PROOF, method)().edge
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return None if error < 1e-8 else f"scores differ by {error:.1e} of the largest"


def logit_difference(examples: Examples) -> Metric:
    """Wrong minus right logit at the last position, summed over examples."""
    right, wrong = (tokens[:, -1:] for tokens in (examples.answers, examples.distractors))

    def metric(logits: Tensor, clean_logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, wrong.to(last.device)) - last.gather(1, right.to(last.device))).sum()

    return metric


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(clean || this) at the last position, nats, summed over examples."""
    found, target = (torch.log_softmax(values[:, -1], -1) for values in (logits, clean_logits))
    return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)


class Stories:
    """stories260K, its pairs, and a threshold that is ``share`` of the KL of the circuit without edges."""

    def __init__(self, share: float, device: str) -> None:
        task = load_task("pronoun-212", load_tokenizer("stories260K"))
        self.examples = task.split("train")
        self.reference = Reference(load_model("stories260K", device), self.examples)
        self.edges = self.reference.model.graph.num_edges
        self.batches: list[Batch] = list(self.reference.batches(256))
        self.threshold = share * self.kl(torch.zeros(self.edges))

    def kl(self, keep: Tensor) -> float:
        return mean_kl(self.reference, Masks(keep.to(self.reference.model.device)), self.batches)

    def acdc(self) -> Variant:
        return Variant(lambda: acdc(self.reference, self.threshold), self.check)

    def full_pass(self) -> Variant:
        """One masked forward pass over everything, as every edge takes when nothing is saved."""
        keep = torch.ones(self.edges)
        return Variant(lambda: self.kl(keep), self.passes_agree, parts=self.edges)

    def published_full_pass(self) -> Variant:
        """The same in the published disentangled form, the full model's runs made before."""
        published, keep = self.published, torch.ones(self.edges, device=self.reference.model.device)
        return Variant(lambda: published.kl(keep), self.passes_agree, parts=self.edges)

    @functools.cached_property
    def published(self) -> "PublishedPass":
        return PublishedPass(self.reference.model, self.examples)

    def passes_agree(self) -> str | None:
        """Both passes give a circuit of half the edges the same KL."""
        keep = (torch.rand(self.edges, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        ours, published = self.kl(keep), self.published.kl(keep.to(self.reference.model.device))
        return None if abs(ours - published) < 1e-4 else f"its KL is {ours:.6f}, the published form's {published:.6f}"

    def check(self) -> str | None:
        """The KL that ACDC says its circuit has is the masked model's."""
        found = acdc(self.reference, self.threshold)
        said, measured = found.history[-1, 3], self.kl(torch.from_numpy(found.keep).float())
        return None if abs(said - measured) < 1e-4 else f"ACDC says a KL of {said:.6f}, the model has {measured:.6f}"


class PublishedPass:
    """A circuit's KL by one forward pass of the published disentangled model over all pairs, one answer each."""

    def __init__(self, model: MaskedCausalLM, examples: Examples) -> None:
        self.model = PublishedEdgePruning(model.model)
        self.ids = examples.input_ids.to(model.device)
        self.answers = examples.answer_mask.to(model.device)
        logits, _ = self.model.full_model(self.ids)
        self.expected = torch.log_softmax(logits[self.answers], -1)
        _, self.corrupted = self.model.full_model(examples.corrupted_input_ids.to(model.device))
        self.node = torch.ones(model.graph.num_writers, device=model.device)

    @torch.no_grad()
    def kl(self, keep: Tensor) -> float:
        """KL(model || circuit), nats, averaged over pairs."""
        logits, _ = self.model.forward(self.ids, self.model.masks_from(keep, self.node), self.corrupted)
        found = torch.log_softmax(logits[self.answers], -1)
        return float(torch.nn.functional.kl_div(found, self.expected, reduction="batchmean", log_target=True))

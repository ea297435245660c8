"""One Edge Pruning training step at its densest: ours, our formula in plain torch, and the published method's."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.case import Case, Target, Variant, Work
from fastcircuit.benchmarks.gate import model_terms, problem
from fastcircuit.benchmarks.models import SHAPES, Shape, random_model, random_pairs, room
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.settings import Settings
from fastcircuit.discovery.steppers import DynamicStepper
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM

QUICK = Shape(layers=3, vocabulary=8192, batch=2, tokens=32)
Divergence = Callable[[Tensor, Tensor], Tensor]

LONG = 10**6  # steps of a run that never gets sparser


def cases(target: Target) -> Iterator[Case]:
    names = ("stories260K",) if target.quick else ("stories260K", "GPT-2 small", "GPT-2 medium")
    for name in names:
        yield step_case(name, SHAPES[name], target)
    if target.quick:
        yield step_case("GPT-2 small, 3 layers", QUICK, target)


def step_case(name: str, shape: Shape, target: Target) -> Case:
    """A step of ``shape``; the published one too where it fits."""
    variants: dict[str, Callable[[Operands], Variant]] = {"fastcircuit": fastcircuit_step, "torch": torch_step}
    published = published_bytes(shape) < 4 * room(target.device)
    if published:
        variants["published"] = published_step
    return Case(
        suite="step",
        name="training step",
        shape=f"{name}: {shape}",
        dtype="float32",
        device=target.device,
        setup=functools.partial(Operands, shape, target.device),
        variants=variants,
        baseline="published" if published else "torch",
        work=least_work(shape),
        counts_memory=not target.quick,
    )


def published_bytes(shape: Shape) -> int:
    """What the published step keeps: a copy of the stream per write, and eager attention's scores."""
    return (2 * shape.layers + 1) * shape.graph.num_writers * shape.batch * shape.tokens * shape.width * 4


def least_work(shape: Shape) -> Work:
    """Of a step whose masks are all in use: products of the forward, and of the backward with respect to the inputs.

    Left out, so that the floor is one: attention itself, norms, and the gradients of masks (0 where one is clamped).
    Bytes: the blocks' weights once forward and once backward; the stream and its gradient written and read once.
    """
    graph, tokens, width = shape.graph, shape.batch * shape.tokens, shape.width
    reads = sum(2 * site.num_edges * tokens * width for site in graph.sites[:-1])
    head = width // shape.heads
    matrices = 3 if shape.architecture == "llama" else 2
    per_block = width * head * (2 * shape.heads + 2 * graph.num_kv_heads)
    per_block += matrices * width * (shape.mlp_width or 4 * width)
    products = 2 * tokens * per_block * (shape.layers - 1)  # the last block runs at the answers alone
    unembedding = 2 * shape.batch * width * shape.vocabulary
    stream = graph.num_writers * tokens * width
    weights = per_block * shape.layers + width * shape.vocabulary
    return Work(2 * (reads + products + unembedding), 4 * (2 * weights + 4 * stream))


class Operands:
    """A random model, its pairs, and the masks that the gate compares at.

    Args:
        published_truth: the truth is the published form's; otherwise our formula's in plain torch, which costs less
            and which the step suite compares with the published form.
    """

    def __init__(self, shape: Shape, device: str, published_truth: bool = True) -> None:
        self.shape, self.device, self.published_truth = shape, device, published_truth
        self.model = random_model(shape, device)
        self.pairs = random_pairs(shape)
        generator = torch.Generator().manual_seed(1)
        graph = shape.graph
        self.edge, self.node = (
            torch.rand(size, generator=generator).to(device) for size in (graph.num_edges, graph.num_writers)
        )

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """KL and its gradients in float64."""
        model = copy.deepcopy(self.model).double()
        if self.published_truth:
            divergence = published_divergence(PublishedEdgePruning(model), published_batch(self))
        else:
            divergence = our_divergence(edge_pruning(self, model, backend="reference"))
        return _with_gradients(divergence, self.edge.double(), self.node.double())

    def check(self, divergence: Divergence) -> str | None:
        """The gate: ``divergence(edge, node)`` and its gradients against the truth."""
        results = _with_gradients(divergence, self.edge, self.node)
        # The KL is a difference of log-probabilities: rounding is relative to those, about ln V, not to what is left.
        scales = [math.log(self.shape.vocabulary), *(float(truth.abs().max()) for truth in self.truth[1:])]
        pairs = list(zip(results, self.truth, scales, strict=True))
        return problem(pairs, model_terms(self.shape.layers, self.shape.width), torch.float32)


def _with_gradients(divergence: Divergence, edge: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    edge, node = (value.clone().requires_grad_() for value in (edge, node))
    with torch.enable_grad():
        kl = divergence(edge, node)
        of_edges, of_nodes = torch.autograd.grad(kl, (edge, node))
    return kl.detach(), of_edges, of_nodes


def edge_pruning(operands: Operands, model: Any = None, learning_rate: float = 1.0, **changes: Any) -> EdgePruning:
    """Our run of the operands' model, or of ``model``; its masks start on and stay there."""
    masked = MaskedCausalLM(operands.model if model is None else model, **changes)
    settings = Settings(
        steps=LONG,
        batch_size=operands.shape.batch,
        initial_log_alpha=10.0,
        sparsity_warmup=LONG,
        learning_rate=learning_rate,
    )
    return EdgePruning(Reference(masked, operands.pairs), operands.shape.graph.num_edges, settings)


def our_divergence(run: EdgePruning) -> Divergence:
    """KL of all the run's examples as one batch."""
    everything = torch.arange(len(run.reference))
    return lambda edge, node: DynamicStepper(run.reference, run.parameters, None).divergence(
        Masks(edge, node), run.reference.batch(everything)
    )


def published_divergence(published: PublishedEdgePruning, batch: dict[str, Tensor]) -> Divergence:
    """The same by the published form; the answer is predicted at the last position."""

    def divergence(edge: Tensor, node: Tensor) -> Tensor:
        full = published.full_model(batch["input_ids"])[0][:, -1]
        corrupted = published.full_model(batch["corrupted_input_ids"])[1]
        logits = published.forward(batch["input_ids"], published.masks_from(edge, node), corrupted)[0][:, -1]
        return kl_divergence(*(torch.log_softmax(x, -1) for x in (full, logits))).mean()

    return divergence


def fastcircuit_step(operands: Operands, **changes: Any) -> Variant:
    run = edge_pruning(operands, **changes)
    return Variant(run.step, functools.partial(operands.check, our_divergence(run)))


def torch_step(operands: Operands) -> Variant:
    """Our formula (one stream, cached runs, answers only) with every masked read in plain torch."""
    return fastcircuit_step(operands, backend="reference")


def published_step(operands: Operands) -> Variant:
    published, batch = PublishedEdgePruning(operands.model, steps=LONG), published_batch(operands)
    divergence = published_divergence(published, batch)
    return Variant(lambda: published.training_step(batch), functools.partial(operands.check, divergence))


def published_batch(operands: Operands) -> dict[str, Tensor]:
    """The pairs as the published step takes them."""
    shape, pairs = operands.shape, operands.pairs
    return {
        "input_ids": pairs.input_ids.to(operands.device),
        "corrupted_input_ids": pairs.corrupted_input_ids.to(operands.device),
        "start": torch.full((shape.batch,), shape.tokens - 1),
        "end": torch.full((shape.batch,), shape.tokens),
    }

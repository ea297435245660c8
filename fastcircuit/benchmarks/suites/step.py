"""One Edge Pruning training step at its densest: ours, our formula in plain torch, and the published method's."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.baselines.plain_torch_step import plain_kl
from fastcircuit.benchmarks.case import Case, Target, Variant, Work
from fastcircuit.benchmarks.gate import model_terms, problem
from fastcircuit.benchmarks.models import SHAPES, Shape, random_model, random_pairs, room
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.settings import Settings
from fastcircuit.discovery.steppers import DynamicStepper, FixedStepper
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks, edge_writers
from fastcircuit.models.masked import MaskedCausalLM

QUICK = Shape(layers=3, vocabulary=8192, batch=2, tokens=32)
Divergence = Callable[[Tensor, Tensor], Tensor]

LONG = 10**6  # steps of a run that never gets sparser
PATIENCE = 2  # times the room of a case that a baseline may take
COMPILED_LAYERS = 12  # compiling takes minutes, more with every layer
REFERENCE, PLAIN = "reference backend", "plain torch"


def cases(target: Target) -> Iterator[Case]:
    yield step_case("stories260K", SHAPES["stories260K"], target)
    if target.quick:
        yield step_case("GPT-2 small, 3 layers", QUICK, target)
        return
    yield step_case("GPT-2 small", SHAPES["GPT-2 small"], target)
    yield step_case("GPT-2 medium", replace(SHAPES["GPT-2 medium"], batch=1), target)


def step_case(name: str, shape: Shape, target: Target) -> Case:
    """A step of ``shape``; the published one and plain torch too where they fit, compiled where there is the time."""
    variants: dict[str, Callable[[Operands], Variant]] = {
        "fastcircuit": fastcircuit_step,
        REFERENCE: functools.partial(fastcircuit_step, backend="reference"),
    }
    most = PATIENCE * room(target.device)
    if plain_bytes(shape) < most:
        variants[PLAIN] = plain_step
        if not target.quick and shape.layers <= COMPILED_LAYERS:
            variants[f"{PLAIN}, compiled"] = functools.partial(plain_step, compiled=True)
    if published_bytes(shape) < most:
        variants["published"] = published_step
    return Case(
        suite="step",
        name="training step",
        shape=f"{name}: {shape}",
        dtype="float32",
        device=target.device,
        setup=functools.partial(Operands, shape, target.device, published_truth=2 * published_bytes(shape) < most),
        variants=variants,
        baseline=next(name for name in ("published", PLAIN, REFERENCE) if name in variants),
        work=least_work(shape),
        counts_memory=not target.quick,
        no_memory=(f"{PLAIN}, compiled",),
    )


def published_bytes(shape: Shape) -> int:
    """What the published step keeps: a copy of the stream per write, and eager attention's scores."""
    return (2 * shape.layers + 1) * shape.graph.num_writers * shape.batch * shape.tokens * shape.width * 4


def plain_bytes(shape: Shape) -> int:
    """What plain torch keeps: at every site the stream so far, and what its readers read."""
    rows = sum(site.num_writers + site.num_readers for site in shape.graph.sites)
    return rows * shape.batch * shape.tokens * shape.width * 4


def least_work(shape: Shape) -> Work:
    """Of a step whose masks are all in use: products of the forward, and of the backward with respect to the inputs.

    Left out, so that the floor is one: attention itself, norms, and the gradients of masks (0 where one is clamped).
    Bytes: the blocks' weights once forward and once backward; the stream and its gradient written and read once.
    """
    graph, tokens, width = shape.graph, shape.batch * shape.tokens, shape.width
    reads = sum(2 * site.num_edges * tokens * width for site in graph.sites[:-1])
    per_block = block_weights(shape)
    products = 2 * tokens * per_block * (shape.layers - 1)  # the last block runs at the answers alone
    unembedding = 2 * shape.batch * width * shape.vocabulary
    stream = graph.num_writers * tokens * width
    weights = per_block * shape.layers + width * shape.vocabulary
    return Work(2 * (reads + products + unembedding), 4 * (2 * weights + 4 * stream))


def block_weights(shape: Shape) -> int:
    """Numbers in the matrices of one block."""
    head, width = shape.width // shape.heads, shape.width
    matrices = 3 if shape.architecture == "llama" else 2
    attention = width * head * (2 * shape.heads + 2 * shape.graph.num_kv_heads)
    return attention + matrices * width * (shape.mlp_width or 4 * width)


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
            divergence = our_divergence(edge_pruning(self, model, step="dynamic", backend="reference"))
        return _with_gradients(divergence, self.edge.double(), self.node.double())

    def at(self, edge: Tensor, node: Tensor) -> "Operands":
        """The same operands, whose gate compares at these masks."""
        other = copy.copy(self)
        other.__dict__.pop("truth", None)
        other.edge, other.node = edge, node
        return other

    def check(self, divergence: Divergence) -> str | None:
        """The gate: ``divergence(edge, node)`` and its gradients against the truth.

        A mask of exactly 0 is clamped and has no gradient: what only such masks read may be skipped.
        """
        kl, *gradients = _with_gradients(divergence, self.edge, self.node)
        # The KL is a difference of log-probabilities: rounding is relative to those, about ln V, not to what is left;
        # that of gradients to the largest there is, of masks of 0 too: those that are on may cancel to nothing.
        largest = max(float(truth.abs().max()) for truth in self.truth[1:])
        pairs = [(kl, self.truth[0], math.log(self.shape.vocabulary))]
        for found, truth, mask in zip(gradients, self.truth[1:], (self.edge, self.node), strict=True):
            pairs.append((found * (mask != 0), truth * (mask != 0), largest))
        return problem(pairs, model_terms(self.shape.layers, self.shape.width), torch.float32)


def _with_gradients(divergence: Divergence, edge: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    edge, node = (value.clone().requires_grad_() for value in (edge, node))
    with torch.enable_grad():
        kl = divergence(edge, node)
        of_edges, of_nodes = torch.autograd.grad(kl, (edge, node))
    return kl.detach(), of_edges, of_nodes


def edge_pruning(
    operands: Operands, model: Any = None, learning_rate: float = 1.0, step: str = "auto", **changes: Any
) -> EdgePruning:
    """Our run of the operands' model, or of ``model``; its masks start on and stay there."""
    masked = MaskedCausalLM(operands.model if model is None else model, **changes)
    settings = Settings(
        steps=LONG,
        batch_size=operands.shape.batch,
        initial_log_alpha=10.0,
        sparsity_warmup=LONG,
        learning_rate=learning_rate,
    )
    reference = Reference(masked, operands.pairs)
    return EdgePruning(reference, operands.shape.graph.num_edges, settings, execution=Execution(step))


def our_divergence(run: EdgePruning) -> Divergence:
    """KL of all the run's examples as one batch, by the stepper that takes the run's steps."""
    stepper = run.stepper
    if isinstance(stepper, FixedStepper):
        return _fixed_divergence(run, stepper)
    everything = torch.arange(len(run.reference))
    return lambda edge, node: stepper.divergence(Masks(edge, node), run.reference.batch(everything))


def _fixed_divergence(run: EdgePruning, stepper: FixedStepper) -> Divergence:
    """What the fixed step accumulates: a KL and its gradient by the product of the masks, put together for autograd."""

    def divergence(edge: Tensor, node: Tensor) -> Tensor:
        product = Masks(edge, node).product(run.model.graph)
        stepper.fit(run.micro_batch)
        for _ in ("as it is", "recorded and replayed"):
            stepper.static.start(product.detach())
            stepper.accumulate(run.step_number, run.batch_indices(run.step_number))
        static = stepper.static
        return static.kl.clone() + (static.gradient.clone() * (product - product.detach())).sum()

    return divergence


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


class PlainStepper(DynamicStepper):
    """Our step with the KL in plain torch, which autograd differentiates."""

    def __init__(self, run: EdgePruning, compiled: bool) -> None:
        super().__init__(run.reference, run.parameters, None)
        self.kl = plain_kl(run.model, compiled)
        self.writers = edge_writers(run.model.graph, run.model.device)

    def divergence(self, masks: Masks, batch: Batch) -> Tensor:
        edge = masks.edge if masks.node is None else masks.edge * masks.node.index_select(0, self.writers)
        tokens = batch.token_ids.unflatten(0, (batch.size, -1))
        return self.kl(edge, tokens, batch.ablated, batch.answers.tokens, batch.answers.log_probs)


def plain_step(operands: Operands, compiled: bool = False) -> Variant:
    """Our formula written down for autograd: what one gets from torch without any of our code in the model."""
    run = edge_pruning(operands, backend="reference")
    run.stepper = stepper = PlainStepper(run, compiled)
    everything = run.reference.batch(torch.arange(len(run.reference)))

    def check() -> str | None:
        run.step()  # a compiled step is compiled before it is timed, however long that takes
        return operands.check(lambda edge, node: stepper.divergence(Masks(edge, node), everything))

    return Variant(run.step, check)


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

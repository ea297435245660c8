"""What does not depend on masks: computed once per example, where the published method runs the model every step."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.case import Case, Target, Variant, Work
from fastcircuit.benchmarks.gate import model_terms, problem
from fastcircuit.benchmarks.models import SHAPES, Shape, random_model, random_pairs
from fastcircuit.benchmarks.suites.step import QUICK, block_weights
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM


def cases(target: Target) -> Iterator[Case]:
    chosen = {"stories260K": SHAPES["stories260K"]}
    chosen |= {"GPT-2 small, 3 layers": QUICK} if target.quick else {"GPT-2 small": SHAPES["GPT-2 small"]}
    for name, shape in chosen.items():
        yield Case(
            suite="cache",
            name="answers and corrupted activations of a batch",
            shape=f"{name}: {shape}",
            dtype="float32",
            device=target.device,
            setup=functools.partial(Operands, shape, target.device),
            variants={"computed": computed, "from the cache": cached, "published": published},
            baseline="published",
            counts_memory=not target.quick,
            ours=("computed",),  # a look-up is so much faster that its ratio says nothing about a regression
        )


def least_work(shape: Shape) -> Work:
    """Of both runs: the products of all blocks but the last, which is needed at the answers alone, and the answers'."""
    weights, unembedding = block_weights(shape) * (shape.layers - 1), shape.width * shape.vocabulary
    tokens = 2 * shape.batch * shape.tokens
    return Work(2 * (tokens * weights + shape.batch * unembedding), 4 * (weights + unembedding))


class Operands:
    """A random model and its pairs; the truth is the Hugging Face model's."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        self.model = random_model(shape, device)
        self.pairs = random_pairs(shape)
        self.ids, self.corrupted_ids = self.pairs.input_ids.to(device), self.pairs.corrupted_input_ids.to(device)

    @functools.cached_property
    @torch.no_grad()
    def truth(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the answers, of the clean and of the corrupted prompts, in float64."""
        model = copy.deepcopy(self.model).double()
        logits = (model(ids).logits[:, -1] for ids in (self.ids, self.corrupted_ids))
        clean, corrupted = (torch.log_softmax(x, -1) for x in logits)
        return clean, corrupted

    def check(self, clean: Tensor, corrupted: Tensor) -> str | None:
        pairs = [(a, b, float(b.abs().max())) for a, b in zip((clean, corrupted), self.truth, strict=True)]
        return problem(pairs, model_terms(self.shape.layers, self.shape.width), torch.float32)


def computed(operands: Operands) -> Variant:
    """Without the cache: both runs of a batch, as they are done once per example."""
    return replace(_ours(operands, Budgets(0, 0)), work=least_work(operands.shape))


def cached(operands: Operands) -> Variant:
    """What every later step pays."""
    return _ours(operands, Budgets(2**40, 0))


def _ours(operands: Operands, budgets: Budgets) -> Variant:
    model = MaskedCausalLM(operands.model)
    reference = Reference(model, operands.pairs, budgets=budgets)
    everything = torch.arange(len(operands.pairs))

    @torch.no_grad()
    def call() -> Batch:
        return reference.batch(everything)

    @torch.no_grad()
    def check() -> str | None:
        batch = call()
        off = Masks(torch.zeros(model.graph.num_edges), torch.zeros(model.graph.num_writers))
        read = model.final_read(batch.token_ids, batch.packing, batch.ablated, off, batch.answers.tokens)
        return operands.check(batch.answers.log_probs, reference.restrict(model.unembed(read)))

    return Variant(call, check)


def published(operands: Operands) -> Variant:
    """Two runs of the disentangled model, as every published step has them."""
    step = PublishedEdgePruning(operands.model)

    def call() -> tuple[Tensor, Tensor]:
        return step.full_model(operands.ids)[0], step.full_model(operands.corrupted_ids)[0]

    def check() -> str | None:
        clean, corrupted = (torch.log_softmax(logits[:, -1], -1) for logits in call())
        return operands.check(clean, corrupted)

    return Variant(call, check, work=least_work(operands.shape))

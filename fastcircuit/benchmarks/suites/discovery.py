"""Edge Pruning end to end on the shipped model, and as many of the published method's steps."""

import functools
from collections.abc import Iterator

import torch

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.circuit import Circuit
from fastcircuit.discovery import discover
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.tasks import load_task

EDGES, BATCH, PROOF_STEPS = 100, 16, 5


def cases(target: Target) -> Iterator[Case]:
    steps = 40 if target.quick else 1000
    yield Case(
        suite="discovery",
        name="Edge Pruning, end to end",
        shape=f"stories260K, pronoun, {steps} steps of {BATCH}, {EDGES} edges",
        dtype="float32",
        device=target.device,
        setup=functools.partial(Operands, steps, target.device),
        variants={"fastcircuit": fastcircuit, "published": published},
        baseline="published",
        counts_memory=not target.quick,
    )


class Operands:
    """Model, task, and the length of the run."""

    def __init__(self, steps: int, device: str) -> None:
        self.steps = steps
        self.model = load_model("stories260K", device)
        self.task = load_task("pronoun", load_tokenizer("stories260K"))


def fastcircuit(operands: Operands) -> Variant:
    """``discover``: the cache, all steps, and the circuit of exactly so many edges."""

    def find(steps: int) -> Circuit:
        return discover(operands.model, operands.task, edges=EDGES, steps=steps, batch_size=BATCH, refine=False).circuit

    def check() -> str | None:
        """As many edges as asked for, and the same ones for the same seed."""
        found = find(PROOF_STEPS)
        if found.num_edges != EDGES:
            return f"the circuit has {found.num_edges} edges, not {EDGES}"
        return None if find(PROOF_STEPS) == found else "the same seed found another circuit"

    return Variant(lambda: find(operands.steps), check)


def published(operands: Operands) -> Variant:
    """The published method's steps alone, timed one by one."""
    step = PublishedEdgePruning(operands.model.model, steps=operands.steps, warmup_steps=1, sparsity_warmup_steps=1)
    train = operands.task.split("train").select(slice(0, BATCH))
    last = train.answer_mask.long().argmax(1)
    device = operands.model.device
    batch = {
        "input_ids": train.input_ids.to(device),
        "corrupted_input_ids": train.corrupted_input_ids.to(device),
        "start": last,
        "end": last + train.answer_mask.sum(1),
    }

    def check() -> str | None:
        """Its full model is the model."""
        with torch.no_grad():
            logits = step.full_model(batch["input_ids"])[0][torch.arange(len(last)), last.to(device)]
            truth = operands.model(
                batch["input_ids"], train.attention_mask.to(device), positions=last.to(device)
            ).logits[:, 0]
        wrong = (logits - truth).abs().max() / truth.abs().max()
        return None if wrong < 1e-4 else f"its logits differ from the model's by {float(wrong):.2g}"

    return Variant(lambda: step.training_step(batch), check, parts=operands.steps)

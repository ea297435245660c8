"""What attribution starts from: the clean run of a batch, its differences, and the loss at a final read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcircuit.discovery.losses import loss_gradient, position_losses
from fastcircuit.discovery.plain_run import Differences, PlainRun
from fastcircuit.evaluation.reference import Batch, Reference, token_chunks

LOGIT_ROWS = 512


@dataclass(frozen=True)
class CleanPoint:
    """A batch at the clean run.

    Args:
        embeds: clean outputs of the embedding tables, ``[E, T, d]``.
        clean: the recorded run.
        differences: clean minus ablated.
    """

    reference: Reference
    loss: str
    batch: Batch
    embeds: Tensor
    clean: PlainRun
    differences: Differences

    def gradient(self, read: Tensor) -> Tensor:
        """Gradient of the loss, summed over the batch's examples, at a final read ``[N, d]``."""
        return loss_gradient(self.loss, self.reference, read, self.batch.answers, self.batch.size)

    @torch.no_grad()
    def losses(self, reads: Tensor) -> Tensor:
        """The loss summed over the batch's examples, at K final reads ``[K, N, d]``: float64 ``[K]``, on the CPU."""
        reference, answers = self.reference, self.batch.answers
        found = []
        for some in reads.split(max(1, LOGIT_ROWS // reads.shape[1])):
            logits = reference.model.unembed(some.flatten(0, 1)).unflatten(0, some.shape[:2])
            each = [position_losses(self.loss, reference, values, answers).double() for values in logits]
            found += [answers.example_total(values, self.batch.size)[0] for values in each]
        return torch.stack(found).cpu()

    def run(self) -> PlainRun:
        """An empty run over the same tokens."""
        return PlainRun.of(self.reference.model, self.batch.packing, self.batch.answers.tokens)


def clean_points(reference: Reference, loss: str, most_bytes: int, keep_graphs: bool = False) -> Iterator[CleanPoint]:
    """All examples in order, as many at a time as have differences of at most ``most_bytes``.

    Args:
        keep_graphs: keep the clean run's graphs, as far as there is room, for a backward pass.
    """
    model = reference.model
    row = model.graph.num_writers * model.config.hidden_size * model.dtype.itemsize
    for first, last in token_chunks(reference.lengths, max(1, most_bytes // row)):
        yield clean_point(reference, loss, reference.bare_batch(torch.arange(first, last)), keep_graphs)


@torch.no_grad()
def clean_point(reference: Reference, loss: str, batch: Batch, keep_graphs: bool = False) -> CleanPoint:
    """Run the model on the batch's clean prompts."""
    model = reference.model
    embeds = torch.stack(model.anatomy.embed(batch.token_ids, batch.packing.position_ids))
    run = PlainRun.of(model, batch.packing, batch.answers.tokens)
    run.keep_graphs &= keep_graphs
    read = run.forward(embeds.sum(0))
    log_probs = reference.restrict(model.unembed(read))
    batch = replace(batch, answers=replace(batch.answers, log_probs=log_probs))
    return CleanPoint(reference, loss, batch, embeds, run, Differences.of(run, embeds, batch.ablated))

"""The ways to carry out a step of Edge Pruning: ``dynamic`` on the shapes of each batch, or ``fixed`` (see Execution).

Both take a step in two halves: ``compute`` finds the gradient and may be done again (out of memory, say) with smaller
micro-batches, ``update`` applies it.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from fastcircuit.discovery import upstream
from fastcircuit.discovery.feeder import Feeder, Prepared
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.static_step import Inputs, StaticStep
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks

Call = Callable[[Hashable, Callable[[], None]], None]


class DynamicStepper:
    """Steps on the shapes that batches have; what masks of exactly 0 make idle is left out by the host."""

    def __init__(self, reference: Reference, parameters: MaskParameters, recompute: bool | None) -> None:
        self.reference, self.model, self.parameters = reference, reference.model, parameters
        self.settings, self.recompute = parameters.settings, recompute
        self.optimizer = parameters.optimizer()
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._pending: list[Tensor] = []
        self._masks: Masks | None = None
        self._losses: tuple[Tensor, Tensor, Tensor] | None = None

    def compute(self, step: int, indices: Tensor, micro_batch: int, generator: torch.Generator) -> None:
        """Sample masks, and leave the gradient of ``KL + penalty`` in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        masks = self.parameters.sample(self.parameters.draw(step, generator))
        penalty, sparsity = self.parameters.penalty(masks, *self.parameters.targets(step))
        if micro_batch >= len(indices):
            kl = self.divergence(masks, self.reference.batch(indices))
            (kl + penalty).backward()
        else:
            kl = self._accumulate(masks, penalty, indices, micro_batch)
        self._masks, self._losses = masks, (kl.detach(), penalty.detach(), sparsity.detach())

    def update(self, step: int) -> None:
        """Apply the gradient, and note the step's numbers."""
        assert self._masks is not None
        assert self._losses is not None
        self._clip(self._masks, step)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self.settings.rate_factor(step)
        if self.settings.upstream_compat:
            upstream.update(self.parameters, self.optimizer)
        else:
            self.optimizer.step()
        row = torch.stack(self._losses).double()
        edge_target, _ = self.parameters.targets(step)
        self._pending.append(torch.cat([row.new_tensor([step]), row, row.new_tensor([edge_target])]))

    def rows(self, first: int, last: int) -> list[list[float]]:
        """The rows of the history of the steps ``first`` to ``last``, which are those not asked for before."""
        rows = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        return rows

    def resume(self, step: int) -> None:
        """Go on with ``step``: everything it needs is in the parameters and the optimizer."""

    def reset(self) -> None:
        """Forget what a step that failed has left."""
        self.optimizer.zero_grad(set_to_none=True)
        self._masks = self._losses = None

    def divergence(self, masks: Masks, batch: Batch) -> Tensor:
        """``KL(full || circuit)`` in nats: mean over an example's answer positions, then over the batch."""
        if self.settings.upstream_compat:
            masks = upstream.detach_frozen_nodes(self.model, masks)
        read = self.model.final_read(
            batch.token_ids,
            batch.packing,
            batch.ablated,
            masks,
            batch.answers.tokens,
            skip_zeros=True,
            recompute=self.recompute,
            changing=batch.changing,
        )
        if self.settings.upstream_compat:
            return upstream.divergence(self.model, batch, self.reference.restrict(self.model.unembed(read)))
        return batch.answers.example_mean(self.reference.divergence(read, batch.answers.log_probs), batch.size)

    def _accumulate(self, masks: Masks, penalty: Tensor, indices: Tensor, micro_batch: int) -> Tensor:
        """The same gradient, some examples at a time: first by the masks, which they share, then through them."""
        learned = [mask for mask in (masks.edge, masks.node) if mask is not None]
        leaves = [mask.detach().requires_grad_() for mask in learned]
        total = torch.zeros((), dtype=masks.edge.dtype, device=masks.edge.device)
        for part in indices.split(micro_batch):
            kl = self.divergence(Masks(*leaves), self.reference.batch(part)) * (len(part) / len(indices))
            kl.backward()
            total += kl.detach()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        torch.autograd.backward([penalty, *learned], [torch.ones_like(penalty), *gradients])
        return total

    def _clip(self, masks: Masks, step: int) -> None:
        norm = self.settings.clip_norm
        if norm is None:
            return
        if self.settings.upstream_compat:
            upstream.clip(self.parameters, masks, step, norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters.parameters(), norm)


class FixedStepper:
    """Steps of a few fixed shapes, whose next micro-batch is prepared while the device computes.

    Args:
        batch: the examples of any step.
        graphs: record the step once per shape and replay it (CUDA); otherwise it runs as it is.
    """

    def __init__(
        self,
        reference: Reference,
        parameters: MaskParameters,
        recompute: bool | None,
        batch: Callable[[int], Tensor],
        graphs: bool,
    ) -> None:
        self.reference, self.batch, self.graphs = reference, batch, graphs
        self.optimizer = parameters.optimizer(on_device=True)
        self.static = StaticStep(reference, parameters, self.optimizer, recompute)
        self.reset()

    def reset(self) -> None:
        """Forget recordings, buffers and what was prepared."""
        self._feeder: Feeder | None = None
        self._prepared: tuple[tuple[int, int, int], Prepared] | None = None
        self._inputs: dict[Hashable, Inputs] = {}
        self._call: Call = _run
        if self.graphs:
            from fastcircuit.discovery.cuda_graphs import Recorder

            self._call = Recorder(self.static.model.device)

    def compute(self, step: int, indices: Tensor, micro_batch: int, generator: torch.Generator) -> None:
        """Sample masks, and leave the gradient by every edge's mask in the static step."""
        self.fit(micro_batch)
        self.static.draw(generator)
        self._call("begin", self.static.begin)
        self.accumulate(step, indices)

    def fit(self, micro_batch: int) -> None:
        """Take so many examples at once from now on."""
        size = min(micro_batch, self.static.settings.batch_size)
        if self._feeder is None or self._feeder.rows != size:
            self.reset()
            self._feeder = Feeder(self.reference, size)

    def accumulate(self, step: int, indices: Tensor) -> None:
        """Leave the KL of a step's examples and its gradient, at the masks that the static step has."""
        assert self._feeder is not None
        size = self._feeder.rows
        for place in range(0, len(indices), size):
            prepared = self._take(step, place, size)
            inputs = self._buffers(prepared)
            self._feeder.take(prepared, inputs)
            self._call(prepared.bucket, partial(self.static.accumulate, inputs))
            self._prepare(step, place + size, size)

    def update(self, step: int) -> None:
        """Apply the gradient, and note the step's numbers."""
        self._call("finish", self.static.finish)

    def rows(self, first: int, last: int) -> list[list[float]]:
        """The rows of the history of the steps ``first`` to ``last``."""
        return self.static.history[first:last].tolist()

    def resume(self, step: int) -> None:
        """Go on with ``step``."""
        self.static.step.fill_(step)
        self.reset()  # the optimizer's state has moved

    def _buffers(self, prepared: Prepared) -> Inputs:
        if prepared.bucket not in self._inputs:
            self._inputs[prepared.bucket] = Inputs.empty(prepared.bucket, self.reference)
        return self._inputs[prepared.bucket]

    def _take(self, step: int, place: int, size: int) -> Prepared:
        """The micro-batch of ``size`` examples from ``place`` of a step's, prepared before or now."""
        if self._prepared is None or self._prepared[0] != (step, place, size):
            self._prepare(step, place, size)
        assert self._prepared is not None
        return self._prepared[1]

    def _prepare(self, step: int, place: int, size: int) -> None:
        """Prepare a micro-batch; past the last one of a step, the first one of the next."""
        assert self._feeder is not None
        indices = self.batch(step)
        if place >= len(indices):
            step, place = step + 1, 0
            if step == self.static.settings.steps:
                return
            indices = self.batch(step)
        self._prepared = (step, place, size), self._feeder.prepare(indices[place : place + size], len(indices))


def _run(key: Hashable, call: Callable[[], None]) -> None:
    call()

"""Edge Pruning: learn a mask on every edge by gradient descent (Bhaskar et al. 2024, section 3 and appendix A).

    minimise  KL(full model || circuit) + l1 (s - t) + l2 (s - t)^2

over log-alphas of edges and writers; t, the sparsity target, rises during the run, and l1, l2 are ascended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcircuit.discovery import upstream
from fastcircuit.discovery.checkpoint import load_checkpoint, save_checkpoint
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.settings import Settings
from fastcircuit.errors import RunError
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.interrupts import deferred_interrupts
from fastcircuit.masks import Masks

COLUMNS = ("step", "kl", "penalty", "edge_sparsity", "edge_target")
REPORT_EVERY = 10


@dataclass(frozen=True)
class Report:
    """Where a run is: one row of its history, and how many steps there are."""

    steps: int
    step: int
    kl: float
    penalty: float
    edge_sparsity: float
    edge_target: float


class EdgePruning:
    """One Edge Pruning run over ``reference``'s examples.

    Everything random comes from the seed and the number of the step, so a run that is resumed draws what the
    uninterrupted one would.

    Args:
        reference: the training examples, with the full model's answers.
        num_edges: edges the circuit should end with.
        identity: what run this is (model, task), kept in checkpoints and compared on resuming.
        ranking: of the edges, ``[num_edges]``, for a warm start.
    """

    def __init__(
        self,
        reference: Reference,
        num_edges: int,
        settings: Settings,
        identity: dict[str, Any] | None = None,
        ranking: np.ndarray | None = None,
    ) -> None:
        self.reference, self.settings = reference, settings
        self.model = reference.model
        self.generator = torch.Generator(self.model.device)
        self.parameters = MaskParameters(
            self.model.graph,
            settings,
            num_edges,
            self.generator.manual_seed(settings.seed),
            self.model.mask_dtype,
            ranking,
        )
        self.optimizer = self.parameters.optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[list[float]] = []
        self._pending: list[Tensor] = []
        self.identity = {**(identity or {}), "num_edges": num_edges, "settings": settings.to_dict()}

    @property
    def step_number(self) -> int:
        """Steps done so far."""
        return len(self.history) + len(self._pending)

    def run(
        self,
        checkpoint: Path | None = None,
        checkpoint_every: int = 500,
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        """Take the remaining steps.

        Args:
            checkpoint: file to write every ``checkpoint_every`` steps and at the end.
            on_report: called every few steps.

        Raises:
            RunError: interrupted, or a loss was not finite; says at which step and what was kept.
        """
        with deferred_interrupts() as interrupt:
            while self.step_number < self.settings.steps:
                self.step()
                last = self.step_number == self.settings.steps
                if last or self.step_number % REPORT_EVERY == 0:
                    self._flush(checkpoint)
                    if on_report is not None:
                        on_report(self.report())
                if checkpoint is not None and (last or interrupt.asked or self.step_number % checkpoint_every == 0):
                    self._flush(checkpoint)
                    self.save(checkpoint)
                if interrupt.asked and not last:
                    kept = f"resume from {checkpoint}" if checkpoint else "nothing was saved"
                    raise RunError(f"interrupted after step {self.step_number} of {self.settings.steps}; {kept}")

    def step(self) -> None:
        """One optimisation step: sample masks, KL, Lagrangian, backward, update."""
        step = self.step_number
        self._set_rates(step)
        masks = self.parameters.sample(self.generator.manual_seed(_step_seed(self.settings.seed, step)))
        kl = self.divergence(masks, self.reference.batch(self.batch_indices(step)))
        penalty, sparsity, target = self.parameters.penalty(masks, step)
        self.optimizer.zero_grad(set_to_none=True)
        (kl + penalty).backward()
        self._clip(masks, step)
        self.optimizer.step()
        if self.settings.upstream_compat:
            upstream.restore_frozen_nodes(self.parameters)
        row = torch.stack([kl.detach(), penalty.detach(), sparsity.detach()]).double()
        self._pending.append(torch.cat([row.new_tensor([step]), row, row.new_tensor([target])]))

    def divergence(self, masks: Masks, batch: Batch) -> Tensor:
        """``KL(full || circuit)`` in nats: mean over an example's answer positions, then over the batch."""
        if self.settings.upstream_compat:
            masks = upstream.detach_frozen_nodes(self.model, masks)
        read = self.model.final_read(
            batch.token_ids, batch.packing, batch.ablated, masks, batch.answers.tokens, skip_zeros=True
        )
        log_probs = self.reference.restrict(self.model.unembed(read))
        return batch.answers.example_mean(kl_divergence(batch.answers.log_probs, log_probs), batch.size)

    def batch_indices(self, step: int) -> Tensor:
        """Examples of this step: a new permutation every epoch, the last batch of an epoch may be smaller."""
        size, total = self.settings.batch_size, len(self.reference)
        epoch, place = divmod(step, math.ceil(total / size))
        generator = torch.Generator().manual_seed(_step_seed(~self.settings.seed, epoch))
        return torch.randperm(total, generator=generator)[place * size : (place + 1) * size]

    def report(self) -> Report:
        """The latest row of the history."""
        step, *values = self.history[-1]
        return Report(self.settings.steps, int(step), *values)

    def save(self, path: Path) -> None:
        """Write a checkpoint (see :mod:`fastcircuit.discovery.checkpoint`); RunError rather than one that holds NaN."""
        for name, value in self.parameters.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise RunError(
                    f"step {self.step_number}: the update made {name} log-alphas or multipliers infinite or NaN; "
                    f"lower the learning rate; {_kept(path)}"
                )
        history = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(COLUMNS))
        save_checkpoint(path, self.parameters, self.optimizer, history, self.identity)

    def resume(self, path: Path) -> None:
        """Take up the run that wrote the checkpoint ``path``."""
        self.history = load_checkpoint(path, self.parameters, self.optimizer, self.identity).tolist()

    def _set_rates(self, step: int) -> None:
        """Linear warm-up from 0, then linear decay to 0."""
        warmup, steps = self.settings.learning_rate_warmup, self.settings.steps
        factor = step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _clip(self, masks: Masks, step: int) -> None:
        if self.settings.clip_norm is None:
            return
        if self.settings.upstream_compat:
            upstream.clip(self.parameters, masks, step, self.settings.clip_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters.parameters(), self.settings.clip_norm)

    def _flush(self, checkpoint: Path | None) -> None:
        """Move the latest steps' numbers to the host, and stop the run if one is not finite."""
        if not self._pending:
            return
        rows = torch.stack(self._pending).tolist()
        self._pending.clear()
        for row in rows:
            named = dict(zip(COLUMNS, row, strict=True))
            broken = [name for name in ("kl", "penalty", "edge_sparsity") if not math.isfinite(named[name])]
            if broken:
                raise RunError(
                    f"step {int(named['step'])}: {broken[0]} is {named[broken[0]]}; lower the learning rate or use a "
                    f"wider dtype; {_kept(checkpoint)}"
                )
        self.history += rows


def _kept(checkpoint: Path | None) -> str:
    """What a stopped run leaves."""
    if checkpoint is not None and checkpoint.exists():
        return f"the last good checkpoint is {checkpoint}"
    return "nothing was saved"


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run."""
    return ((seed & 0x7FFFFFFF) << 32 | (step + 1)) & 0x7FFFFFFFFFFFFFFF

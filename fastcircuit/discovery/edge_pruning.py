"""Edge Pruning: learn a mask on every edge by gradient descent (Bhaskar et al. 2024, section 3 and appendix A).

    minimise  KL(full model || circuit) + l1 (s - t) + l2 (s - t)^2

over log-alphas of edges and writers; t, the sparsity target, rises during the run, and l1, l2 are ascended.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcircuit.discovery.checkpoint import load_checkpoint, save_checkpoint
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.settings import Settings
from fastcircuit.discovery.static_step import reasons_against
from fastcircuit.discovery.steppers import DynamicStepper, FixedStepper
from fastcircuit.errors import RunError
from fastcircuit.evaluation.reference import Reference
from fastcircuit.interrupts import deferred_interrupts
from fastcircuit.ops.backends import is_compiled
from fastcircuit.ops.memory import ERRORS, free_cached_memory, is_out_of_memory

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
        execution: how to carry out the steps; no part of the identity, it may change on resuming.
        on_note: called with a line about anything the run had to change (micro-batches, when memory runs out).
    """

    def __init__(
        self,
        reference: Reference,
        num_edges: int,
        settings: Settings,
        identity: dict[str, Any] | None = None,
        ranking: np.ndarray | None = None,
        execution: Execution | None = None,
        on_note: Callable[[str], None] | None = None,
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
            self._sampler(),
        )
        execution, self.on_note = execution or Execution(), on_note
        self.micro_batch = min(execution.micro_batch or settings.batch_size, settings.batch_size)
        self.stepper = self._stepper(execution)
        self.history: list[list[float]] = []
        self._pending = 0
        self._checkpoint: Path | None = None
        self.identity = {**(identity or {}), "num_edges": num_edges, "settings": settings.to_dict()}

    @property
    def step_number(self) -> int:
        """Steps done so far."""
        return len(self.history) + self._pending

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
            RunError: interrupted, out of memory with a single example at a time, or a loss was not finite; says at
                which step and what was kept.
        """
        self._checkpoint = checkpoint
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
                if interrupt.asked:
                    kept = f"resume from {checkpoint}" if checkpoint else "nothing was saved"
                    raise RunError(f"interrupted after step {self.step_number} of {self.settings.steps}; {kept}")

    def step(self) -> None:
        """One optimisation step: sample masks, KL, Lagrangian, backward, update.

        Raises:
            RunError: memory ran out with a single example at a time.
        """
        step = self.step_number
        indices = self.batch_indices(step)
        while not self._compute(step, indices):
            self._halve_micro_batch(step)
        self._update(step)
        self._pending += 1

    def _compute(self, step: int, indices: Tensor) -> bool:
        """The gradient of a step, which changes nothing yet; False when memory ran out."""
        try:
            generator = self.generator.manual_seed(_step_seed(self.settings.seed, step))
            self.stepper.compute(step, indices, self.micro_batch, generator)
        except ERRORS as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _update(self, step: int) -> None:
        """Apply the gradient; out of memory may leave it applied in part, so that only earlier checkpoints are good."""
        try:
            self.stepper.update(step)
        except ERRORS as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"step {step}: out of memory in the update; free memory on {self.model.device}; "
                f"{_kept(self._checkpoint)}"
            ) from error

    def _halve_micro_batch(self, step: int) -> None:
        self.stepper.reset()
        free_cached_memory(self.model.device)
        if self.micro_batch == 1:
            if self._checkpoint is not None:
                self._flush(self._checkpoint)
                self.save(self._checkpoint)
            raise RunError(
                f"step {step}: out of memory with one example at a time; free memory on {self.model.device}, or use "
                f"shorter prompts or a narrower dtype; {_kept(self._checkpoint)}"
            )
        self.micro_batch //= 2
        if self.on_note is not None:
            self.on_note(
                f"out of memory at step {step}: going on with {self.micro_batch} of {self.settings.batch_size} "
                "examples at a time (the same result, more slowly)"
            )

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
        save_checkpoint(path, self.parameters, self.stepper.optimizer, history, self.identity)

    def resume(self, path: Path) -> None:
        """Take up the run that wrote the checkpoint ``path``."""
        self.history = load_checkpoint(path, self.parameters, self.stepper.optimizer, self.identity).tolist()
        self.stepper.resume(len(self.history))

    def _sampler(self) -> str | None:
        """The backend that samples all masks at once, if there is a compiled one."""
        backend, like = self.model.backend, torch.empty(0, dtype=self.model.mask_dtype, device=self.model.device)
        return backend if is_compiled("hard_concrete", backend, like) else None

    def _stepper(self, execution: Execution) -> DynamicStepper | FixedStepper:
        kind = execution.choose_step(self.model.device, reasons_against(self.model, self.settings))
        if kind == "dynamic":
            return DynamicStepper(self.reference, self.parameters, execution.recompute)
        return FixedStepper(
            self.reference, self.parameters, execution.recompute, self.batch_indices, graphs=kind == "graph"
        )

    def _flush(self, checkpoint: Path | None) -> None:
        """Move the latest steps' numbers to the host, and stop the run if one is not finite."""
        rows = self.stepper.rows(len(self.history), self.step_number)
        self._pending = 0
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
    """A seed of its own for every step of every run, in its low 32 bits: a CPU generator looks at no more."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

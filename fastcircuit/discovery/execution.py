"""How a run is carried out: nothing here changes its result."""

from dataclasses import dataclass

import torch

from fastcircuit.errors import InputError

STEPS = ("auto", "dynamic", "fixed", "graph")


@dataclass(frozen=True)
class Execution:
    """How to run the steps.

    Args:
        step: ``dynamic`` (the host leaves out what masks of 0 make idle), ``fixed`` (fixed shapes, nothing asked of the
            device), ``graph`` (the same, recorded once per shape as a CUDA graph and replayed); ``auto``: ``graph`` on
            a CUDA device where it can be, otherwise ``dynamic``.
        micro_batch: examples that run at once; their gradients add up to those of the whole batch. None: the batch.
        recompute: as in :class:`fastcircuit.models.masked.MaskedCausalLM`; None: the model's own.
    """

    step: str = "auto"
    micro_batch: int | None = None
    recompute: bool | None = None

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise InputError(f"step is {self.step!r}; accepted: {', '.join(STEPS)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch is {self.micro_batch}; it must be at least 1")

    def choose_step(self, device: torch.device, reasons_against_fixed: list[str]) -> str:
        """``dynamic``, ``fixed`` or ``graph``; InputError when the one asked for by name cannot be."""
        if self.step == "auto":
            return "graph" if device.type == "cuda" and not reasons_against_fixed else "dynamic"
        if self.step != "dynamic" and reasons_against_fixed:
            raise InputError(f"step {self.step!r} cannot run this: {'; '.join(reasons_against_fixed)}; use 'dynamic'")
        if self.step == "graph" and device.type != "cuda":
            raise InputError(f"step 'graph' needs a CUDA device; the model is on {device}; use 'fixed' or 'dynamic'")
        return self.step

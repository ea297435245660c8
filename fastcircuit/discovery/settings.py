"""Hyperparameters of an Edge Pruning run."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastcircuit.circuit import ABLATIONS, OUTPUT_BIAS, Ablation
from fastcircuit.errors import InputError, check_seed

SCHEDULES = ("linear", "logarithmic")
SPARSITY_ESTIMATES = ("expected", "sampled")
# A start that knows an order of the edges is lost within a few steps of the usual size.
_WARM_RATE = 0.1


@dataclass(frozen=True)
class Settings:
    """How to run Edge Pruning. The defaults are the recommended ones; ``presets.py`` has the published ones.

    Args:
        steps: optimisation steps.
        batch_size: examples per step.
        learning_rate: of the log-alphas of edges and writers (Adam).
        multiplier_learning_rate: of the Lagrange multipliers (gradient ascent, Adam).
        learning_rate_warmup: steps over which both rise linearly from 0; then they fall linearly to 0.
        sparsity_warmup: steps over which the targets rise to their final values.
        schedule: of the targets, ``linear`` or ``logarithmic``.
        edge_target: final edge-sparsity target (may exceed 1 when linear); None: one that suits the size asked for.
        node_masks: learn a mask per writer as well, as published; an edge is on when both are. Without a node_target
            the KL alone moves them. It stays the default because the edge target that suits a size (see
            ``default_edge_target``) and the recorded results were measured with it.
        node_target: final writer-sparsity target, which needs node_masks; None: no such term.
        silent_node_target: with ``upstream_compat`` and no node_target, the writer target whose gradient the published
            code still counts when it clips.
        initial_log_alpha: where every log-alpha starts.
        warm_start: an attribution (``eap-ig``, ...) whose ranking the log-alphas of edges start from instead; the edge
            target then starts at the sparsity of that start, and :meth:`changed` lowers the learning rate. None: from
            nothing.
        sparsity_estimate: ``expected`` (closed form) or ``sampled`` (mean of the sampled masks, as published).
        linear_term: False fixes the multiplier of the linear Lagrangian term at 0.
        weight_decay: of AdamW, on log-alphas and multipliers: the published code's, which is AdamW's own. It stays for
            the same reason as node_masks.
        clip_norm: gradients are scaled down to this joint norm; None: not clipped.
        refine: finish by measured elimination, regrowing and swaps (see ``refine.py``); False: the surest edges as they
            are.
        refine_surplus: elimination starts from this many edges more than asked for (for circuits up to 256 edges; its
            cost grows with their number).
        refine_cycles: how often that many edges are grown again and eliminated.
        refine_swaps: rounds of swaps after it, and again after joint moves, if any lowered the KL; 0: neither.
        ablation, output_bias: what a removed edge carries (see ``evaluation.reference``).
        both_directions: train on every pair the other way round too, its corrupted prompt as the clean one. For
            behaviours whose corrupted prompts are prompts of the same kind; the KL asks for no answers.
        upstream_compat: reproduce the published code's numerics, quirks included.
        seed: of everything random.
    """

    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 1.0
    multiplier_learning_rate: float = 0.8
    learning_rate_warmup: int = 104
    sparsity_warmup: int = 664
    schedule: str = "linear"
    edge_target: float | None = None
    node_masks: bool = True
    node_target: float | None = None
    silent_node_target: float | None = None
    initial_log_alpha: float = 10.0
    warm_start: str | None = None
    sparsity_estimate: str = "sampled"
    linear_term: bool = True
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    refine: bool = True
    refine_surplus: int = 16
    refine_cycles: int = 3
    refine_swaps: int = 50
    ablation: Ablation = "interchange"
    output_bias: str = "split"
    both_directions: bool = False
    upstream_compat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("refine_surplus", "refine_cycles", "refine_swaps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("learning_rate", "multiplier_learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, accepted in (
            ("schedule", SCHEDULES),
            ("sparsity_estimate", SPARSITY_ESTIMATES),
            ("ablation", ABLATIONS),
            ("output_bias", OUTPUT_BIAS),
        ):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        self._check_directions()
        self._check_targets()

    def _check_directions(self) -> None:
        if self.both_directions and self.ablation != "interchange":
            raise InputError(
                f"both_directions is for interchange ablation, which has two prompts; ablation is {self.ablation!r}"
            )
        if self.both_directions and self.upstream_compat:
            raise InputError("both_directions is not part of the published method; leave it out, or upstream_compat")

    def _check_targets(self) -> None:
        for name in ("edge_target", "node_target", "silent_node_target"):
            target = getattr(self, name)
            if target is None:
                continue
            if name != "edge_target" and not self.node_masks:
                raise InputError(
                    f"{name} is {target}, and there are no masks of writers; leave it out or set node_masks"
                )
            if self.schedule == "logarithmic" and not target < 1:
                raise InputError(f"{name} is {target}; with a logarithmic schedule it must be below 1, or use linear")

    def changed(self, changes: dict[str, Any]) -> "Settings":
        """These settings with some changed by name; InputError for a name there is not.

        With another number of steps and nothing said about the warm-ups, those keep their share of the run; with a
        warm start and nothing said about the learning rate of the log-alphas, that is a tenth of what it was.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise InputError(f"no setting {unknown[0]!r}; settings are {', '.join(known)}")
        if "steps" in changes and changes["steps"] > 0:
            for name in ("learning_rate_warmup", "sparsity_warmup"):
                changes = {name: round(getattr(self, name) * changes["steps"] / self.steps), **changes}
        if changes.get("warm_start") is not None and self.warm_start is None:
            changes = {"learning_rate": _WARM_RATE * self.learning_rate, **changes}
        return dataclasses.replace(self, **changes)

    def rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at ``step``: linear warm-up from 0, then linear decay to 0."""
        warmup = self.learning_rate_warmup
        return step / warmup if step < warmup else (self.steps - step) / max(1, self.steps - warmup)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

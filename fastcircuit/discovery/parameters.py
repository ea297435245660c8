"""What Edge Pruning learns: log-alphas of edges and writers, and the Lagrange multipliers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcircuit.discovery.settings import Settings
from fastcircuit.graph import Graph
from fastcircuit.masks import (
    EPSILON,
    STRETCH,
    TEMPERATURE,
    ZERO_LEVEL,
    Lagrangian,
    Sample,
    edge_writers,
    probability_of_zero,
    sample_at,
    target_sparsity,
    uniform_,
)
from fastcircuit.ops import hard_concrete

_INITIAL_SPREAD = 0.01
_MOST_INT64 = 2**63 - 1
_OVERSHOOT, _DENSE = 0.15, 0.075
# A warm start leaves this many times the edges asked for on, or a tenth of the graph if that is more.
_WARM_SURPLUS, _WARM_DENSITY = 4.0, 0.1


def default_edge_target(density: float, schedule: str = "linear") -> float:
    """Sparsity target with which a run ends near a circuit that keeps ``density`` of the edges.

    ``1 - density``, plus ``0.15 ln(0.075 / density)`` below a density of 7.5 %: sparser runs lag behind their target,
    which is why the published ones aim above 1. The slope was measured on stories260K; the circuit's size does not
    depend on it. A ``logarithmic`` schedule cannot reach 1, so that it aims at ``1 - density`` itself.
    """
    if schedule == "logarithmic":
        return 1 - density
    return 1 - density + max(0.0, _OVERSHOOT * math.log(_DENSE / density))


def warm_density(num_edges: int, total: int) -> float:
    """The fraction of edges that a warm start leaves on, of which ``num_edges`` are wanted in the end."""
    return min(0.9, max(_WARM_DENSITY, _WARM_SURPLUS * num_edges / total))


def warm_log_alphas(ranking: np.ndarray, density: float) -> Tensor:
    """Log-alphas in the order of ``ranking`` ``[num_edges]``, with a ``density`` of masks on: float64 ``[num_edges]``.

    The edge at quantile q (0: the best) gets ``a0 + logit(density) - logit(q)``; at ``a0`` a mask is 0 half the time.
    """
    order = np.argsort(np.argsort(-ranking, kind="stable"), kind="stable")
    quantile = torch.from_numpy((order + 0.5) / len(order))
    return ZERO_LEVEL + math.log(density / (1 - density)) - torch.logit(quantile)


class MaskParameters(nn.Module):
    """Log-alphas ``edge`` ``[num_edges]`` and ``node`` ``[num_writers]``, and the multipliers of both sparsities.

    Args:
        num_edges: edges the circuit should end with; sets the edge target unless the settings give one.
        ranking: of the edges, ``[num_edges]``, for a warm start.
        backend: of :func:`fastcircuit.ops.hard_concrete`, which then samples all masks at once, from the seed and the
            number of the step; None: torch does, from its generator.
    """

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        num_edges: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        ranking: np.ndarray | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.settings, self.num_edges, self.backend = graph, settings, num_edges, backend
        self.edge, self.node = (
            nn.Parameter(
                settings.initial_log_alpha
                + _INITIAL_SPREAD * torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
            )
            for size in (graph.num_edges, graph.num_writers)
        )
        self.first_target = 0.0
        if settings.warm_start is not None:
            density = warm_density(num_edges, graph.num_edges)
            self.first_target = 1 - density  # what is on is only partly so: the masks may grow a little at first
            if ranking is not None:
                self.edge.data.copy_(warm_log_alphas(ranking, density))
        self.edge_multipliers = Lagrangian(settings.linear_term)
        self.node_multipliers = Lagrangian(settings.linear_term)
        self.to(generator.device)

    def optimizer(self, on_device: bool = False) -> torch.optim.Optimizer:
        """AdamW over log-alphas (descent) and multipliers (ascent).

        Args:
            on_device: keep the learning rates and the step count in tensors beside the parameters, so that a step asks
                the host for nothing. Same updates, and the same state in checkpoints.
        """
        settings = self.settings
        multipliers = list(self.edge_multipliers.parameters())
        if settings.node_target is not None:
            multipliers += self.node_multipliers.parameters()
        groups: list[dict[str, Any]] = [
            {"params": [self.edge, self.node] if settings.node_masks else [self.edge], "lr": settings.learning_rate},
            {"params": multipliers, "lr": settings.multiplier_learning_rate, "maximize": True},
        ]
        if on_device:
            for group in groups:
                group["lr"] = torch.full((), group["lr"], dtype=self.rate_dtype, device=self.edge.device)
        return torch.optim.AdamW(
            groups, weight_decay=settings.weight_decay, fused=on_device or None, capturable=on_device
        )

    @property
    def rate_dtype(self) -> torch.dtype:
        """Of learning rates on the device: the fused AdamW of CUDA takes float32 alone."""
        return torch.float32 if self.edge.device.type == "cuda" else torch.float64

    def rates(self) -> Tensor:
        """The learning rate of each of the optimizer's groups at every step, ``[groups, steps]``, on the device."""
        settings = self.settings
        factors = torch.tensor([settings.rate_factor(step) for step in range(settings.steps)], dtype=torch.float64)
        peaks = torch.tensor([settings.learning_rate, settings.multiplier_learning_rate], dtype=torch.float64)
        return (peaks[:, None] * factors).to(device=self.edge.device, dtype=self.rate_dtype)

    def targets(self, step: int) -> tuple[float, float]:
        """The edge and the writer sparsity aimed at in ``step``; without a writer target that is 0, and not used."""
        settings, goal = self.settings, self.settings.edge_target
        if goal is None:
            goal = default_edge_target(self.num_edges / self.graph.num_edges, settings.schedule)
        nodes = 0.0 if settings.node_target is None else settings.node_target
        warmup = settings.sparsity_warmup
        start = min(self.first_target, goal)
        edge = target_sparsity(step, warmup, goal, settings.schedule, start)
        return edge, target_sparsity(step, warmup, nodes, settings.schedule)

    def draw(self, step: int, generator: torch.Generator | None = None) -> Tensor:
        """What the sample of a step is made from: uniform numbers ``[edges + writers]`` from the generator; where a
        backend draws its own, int64 ``[2]``, the run's seed and the step.
        """
        if self.backend is not None:
            return torch.tensor([self.settings.seed & _MOST_INT64, step], device=self.edge.device)
        return self.draw_uniform_(
            torch.empty(sum(self._sizes), dtype=self.edge.dtype, device=self.edge.device), generator
        )

    def draw_uniform_(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Fill ``noise`` ``[edges + writers]`` with the uniform numbers of a sample."""
        edge, node = noise.split(self._sizes)
        uniform_(edge, generator)
        if self.settings.node_masks:
            uniform_(node, generator)
        return noise

    def sample(self, drawn: Tensor) -> Sample:
        """The hard-concrete sample of every mask that is made from what :meth:`draw` gave."""
        expected, node_masks = self.settings.sparsity_estimate == "expected", self.settings.node_masks
        if self.backend is not None:
            return self._sample_at_once(drawn, self.backend)
        parts = list(zip((self.edge, self.node), drawn.split(self._sizes), strict=True))[: 2 if node_masks else 1]
        sampled = [sample_at(value, noise) for value, noise in parts]
        on = [1 - probability_of_zero(value) for value, _ in parts] if expected else []
        return _sample(sampled, on)

    def _sample_at_once(self, seed: Tensor, backend: str) -> Sample:
        log_alpha, sizes = torch.cat([self.edge, self.node]), self._sizes
        if not self.settings.node_masks:
            log_alpha, sizes = self.edge, sizes[:1]
        numbers: dict[str, Any] = {"temperature": TEMPERATURE, "stretch": STRETCH, "epsilon": EPSILON}
        z, on = hard_concrete(log_alpha, seed, **numbers, backend=backend)
        return _sample(z.split(sizes), on.split(sizes))

    @property
    def _sizes(self) -> list[int]:
        return [len(self.edge), len(self.node)]

    def edge_sparsity(self, masks: Sample) -> Tensor:
        """Edge sparsity the Lagrangian sees: of the sampled edge masks, or expected of the edge-and-writer product."""
        if self.settings.sparsity_estimate == "sampled":
            return 1 - masks.edge.mean()
        assert masks.edge_on is not None
        if masks.node_on is None:
            return 1 - masks.edge_on.mean()
        writers = edge_writers(self.graph, masks.node_on.device)
        return 1 - (masks.edge_on * masks.node_on.index_select(0, writers)).mean()

    def node_sparsity(self, masks: Sample) -> Tensor:
        """Writer sparsity the Lagrangian sees."""
        values = masks.node if self.settings.sparsity_estimate == "sampled" else masks.node_on
        assert values is not None
        return 1 - values.mean()

    def penalty(self, masks: Sample, edge_target: float | Tensor, node_target: float | Tensor) -> tuple[Tensor, Tensor]:
        """The Lagrangian terms for these targets, and the edge sparsity."""
        sparsity = self.edge_sparsity(masks)
        penalty = self.edge_multipliers(sparsity, edge_target)
        if self.settings.node_target is not None:
            penalty = penalty + self.node_multipliers(self.node_sparsity(masks), node_target)
        return penalty, sparsity

    @torch.no_grad()
    def scores(self) -> np.ndarray:
        """Log-probability that an edge is on, ``ln P(z_edge > 0) + ln P(z_node > 0)``, float64 ``[num_edges]``."""
        edge, node = (nn.functional.logsigmoid(value.double() - ZERO_LEVEL) for value in (self.edge, self.node))
        if not self.settings.node_masks:
            return edge.cpu().numpy()
        return (edge + node[edge_writers(self.graph, node.device)]).cpu().numpy()


def _sample(values: Sequence[Tensor], on: Sequence[Tensor]) -> Sample:
    """Of edges, or of edges and writers."""
    edge, node = (*values, None)[:2]
    edge_on, node_on = (*on, None, None)[:2]
    assert edge is not None
    return Sample(edge, node, edge_on, node_on)

"""What Edge Pruning learns: log-alphas of edges and writers, and the Lagrange multipliers."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcircuit.discovery.settings import Settings
from fastcircuit.graph import Graph
from fastcircuit.masks import (
    ZERO_LEVEL,
    Lagrangian,
    Masks,
    edge_writers,
    probability_of_zero,
    sample,
    target_sparsity,
)

_INITIAL_SPREAD = 0.01
_OVERSHOOT, _DENSE = 0.15, 0.075
# A warm start leaves this many times the edges asked for on, or a tenth of the graph if that is more.
_WARM_SURPLUS, _WARM_DENSITY = 4.0, 0.1


def default_edge_target(density: float) -> float:
    """Sparsity target with which a run ends near a circuit that keeps ``density`` of the edges.

    ``1 - density``, plus ``0.15 ln(0.075 / density)`` below a density of 7.5 %: sparser runs lag behind their target,
    which is why the published ones aim above 1. The slope was measured on stories260K; the circuit's size does not
    depend on it.
    """
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
    """

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        num_edges: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        ranking: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.settings, self.num_edges = graph, settings, num_edges
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
            goal = default_edge_target(self.num_edges / self.graph.num_edges)
        nodes = 0.0 if settings.node_target is None else settings.node_target
        warmup = settings.sparsity_warmup
        start = min(self.first_target, goal)
        edge = target_sparsity(step, warmup, goal, settings.schedule, start)
        return edge, target_sparsity(step, warmup, nodes, settings.schedule)

    def sample(self, generator: torch.Generator) -> Masks:
        """One hard-concrete sample of every mask."""
        edge = sample(self.edge, generator)
        return Masks(edge, sample(self.node, generator) if self.settings.node_masks else None)

    def edge_sparsity(self, masks: Masks) -> Tensor:
        """Edge sparsity the Lagrangian sees: of the sampled edge masks, or expected of the edge-and-writer product."""
        if self.settings.sparsity_estimate == "sampled":
            return 1 - masks.edge.mean()
        edge_on = 1 - probability_of_zero(self.edge)
        if masks.node is None:
            return 1 - edge_on.mean()
        node_on = 1 - probability_of_zero(self.node)
        return 1 - (edge_on * node_on.index_select(0, edge_writers(self.graph, node_on.device))).mean()

    def node_sparsity(self, masks: Masks) -> Tensor:
        """Writer sparsity the Lagrangian sees."""
        if self.settings.sparsity_estimate == "sampled":
            assert masks.node is not None
            return 1 - masks.node.mean()
        return probability_of_zero(self.node).mean()

    def penalty(self, masks: Masks, edge_target: float | Tensor, node_target: float | Tensor) -> tuple[Tensor, Tensor]:
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

"""Masks over edges and writers: the hard-concrete distribution, sparsity, and the Lagrangian that drives it.

Edge Pruning, appendix A; Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization".
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph

TEMPERATURE = 2 / 3
STRETCH = (-0.1, 1.1)
EPSILON = 1e-6
# A log-alpha at this level or above samples exactly 1 almost always: where training starts.
INITIAL_LOG_ALPHA = 10.0
# Distance, in log-alpha, between "certainly 0" and the level where 0 has probability one half.
ZERO_LEVEL = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])


@dataclass(frozen=True)
class Masks:
    """Mask values in [0, 1]; an edge is on to the degree ``edge[e] * node[writer of e]``.

    Args:
        edge: ``[num_edges]`` in ``graph.edges`` order.
        node: ``[num_writers]`` in ``graph.writers`` order; None: all 1.
    """

    edge: Tensor
    node: Tensor | None = None

    @classmethod
    def from_circuit(cls, circuit: Circuit, dtype: torch.dtype = torch.float32) -> "Masks":
        """Ones on the circuit's edges, zeros elsewhere."""
        return cls(torch.from_numpy(circuit.keep.copy()).to(dtype))

    def product(self, graph: Graph) -> Tensor:
        """``z_rj = z_edge[r, j] * z_node[j]`` of every edge, ``[num_edges]``."""
        if self.edge.shape != (graph.num_edges,):
            raise InputError(f"masks.edge has shape {tuple(self.edge.shape)}; this graph has {graph.num_edges} edges")
        if self.node is None:
            return self.edge
        if self.node.shape != (graph.num_writers,):
            raise InputError(
                f"masks.node has shape {tuple(self.node.shape)}; this graph has {graph.num_writers} writers"
            )
        return self.edge * self.node.index_select(0, edge_writers(graph, self.node.device))


@dataclass(frozen=True)
class Sample(Masks):
    """Sampled masks, and if it is wanted the probability that each is not 0.

    Args:
        edge_on, node_on: as ``edge`` and ``node``; None: not asked for.
    """

    edge_on: Tensor | None = None
    node_on: Tensor | None = None


@lru_cache(maxsize=8)
def edge_writers(graph: Graph, device: torch.device) -> Tensor:
    """``graph.edge_writers`` as an int64 tensor on ``device``."""
    return _indices(graph.edge_writers, device)


@lru_cache(maxsize=8)
def _edge_readers(graph: Graph, device: torch.device) -> Tensor:
    return _indices(graph.edge_readers, device)


@lru_cache(maxsize=8)
def _feeds(graph: Graph, device: torch.device) -> tuple[Tensor, Tensor]:
    readers, writers = graph.feeds
    return _indices(readers, device), _indices(writers, device)


def _indices(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device=device, dtype=torch.int64)


def alive(graph: Graph, product: Tensor) -> tuple[Tensor, Tensor]:
    """Which writers have an edge of ``product`` ``[num_edges]`` that is not 0, and which readers feed such a writer.

    The host is not asked.

    Returns:
        Bool ``[num_writers]``; bool ``[num_readers]``, the final read among them.
    """
    writers = edge_writers(graph, product.device)
    feeding, fed = _feeds(graph, product.device)
    times_read = product.new_zeros(graph.num_writers).index_add_(0, writers, (product != 0).to(product.dtype))
    feeds = product.new_zeros(graph.num_readers).index_add_(0, feeding, times_read.index_select(0, fed))
    feeds[-1:].fill_(1)  # the final read
    return times_read > 0, feeds > 0


def without_dead_ends(graph: Graph, product: Tensor, rounds: int = 2) -> Tensor:
    """``product`` ``[num_edges]`` with 0 for edges into readers whose writers nothing reads; the host is not asked.

    What such a head or MLP writes meets masks of 0 alone, so no result changes, and no gradient: that of its reads is
    exactly 0. Then what it alone read need not be read either.

    Args:
        rounds: each one finds what the one before has left without readers.
    """
    edge_readers = _edge_readers(graph, product.device)
    for _ in range(rounds):
        _, readers = alive(graph, product)
        product = torch.where(readers.index_select(0, edge_readers), product, 0)
    return product


def sample(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One hard-concrete sample per entry, differentiable in ``log_alpha``; see :func:`sample_at`."""
    return sample_at(log_alpha, uniform_(torch.empty_like(log_alpha, requires_grad=False), generator))


def uniform_(noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``noise`` with what :func:`sample_at` wants: uniform in ``[EPSILON, 1 - EPSILON]``."""
    torch.rand(noise.shape, generator=generator, out=noise)
    return noise.mul_(1 - 2 * EPSILON).add_(EPSILON)


def sample_at(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The hard-concrete value at ``uniform`` in (0, 1): ``z = clamp(1.2 s - 0.1, 0, 1)``.

    ``s = sigmoid((ln u - ln(1 - u) + log_alpha) / (2/3))``. The gradient is exactly 0 where the clamp holds.
    """
    low, high = STRETCH
    concrete = torch.sigmoid((torch.logit(uniform) + log_alpha) / TEMPERATURE)
    return torch.clamp(concrete * (high - low) + low, 0, 1)


def probability_of_zero(log_alpha: Tensor) -> Tensor:
    """``P(z = 0) = sigmoid(T ln(0.1 / 1.1) - log_alpha)``: closed form, differentiable."""
    return torch.sigmoid(ZERO_LEVEL - log_alpha)


def soft_value(log_alpha: Tensor) -> Tensor:
    """The published code's deterministic mask with its zeros not cut, ``sigmoid(0.8 log_alpha / T)``: orders edges."""
    return torch.sigmoid(log_alpha * (0.8 / TEMPERATURE))


class Lagrangian(nn.Module):
    """``l1 (s - t) + l2 (s - t)^2`` for a sparsity s and its target t; both multipliers are *ascended*.

    Args:
        linear_term: False fixes ``l1`` at 0.
    """

    def __init__(self, linear_term: bool = True) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()), requires_grad=linear_term)
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float | Tensor) -> Tensor:
        gap = sparsity - target
        return self.linear * gap + self.quadratic * gap.square()


def target_sparsity(step: int, warmup: int, final: float, schedule: str = "linear", start: float = 0.0) -> float:
    """Target at ``step`` (from 0): from ``start`` to ``final`` over ``warmup`` steps, then ``final``.

    ``linear`` moves the sparsity evenly; ``logarithmic`` moves ``ln(1 - sparsity)`` evenly, so that the number of kept
    edges falls by the same factor every step (needs ``final < 1``).
    """
    if schedule not in ("linear", "logarithmic"):
        raise InputError(f"target schedule is {schedule!r}; accepted: linear, logarithmic")
    if schedule == "logarithmic" and final >= 1:
        raise InputError(f"a logarithmic schedule needs a final target below 1, got {final}; use linear")
    if step >= warmup:
        return final
    progress = step / warmup
    if schedule == "linear":
        return start + (final - start) * progress
    return 1 - math.exp(math.log1p(-start) + (math.log1p(-final) - math.log1p(-start)) * progress)

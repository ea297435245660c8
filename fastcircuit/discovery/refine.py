"""Refinement: swap edges in and out of a finished circuit while that lowers its training KL.

The gradient of the KL at the hard circuit estimates, to first order, what adding an edge gains and what removing one
costs. Each round swaps the few kept edges that seem to cost least for the missing ones that seem to gain most, measures
the KL, and keeps the swap only if the KL fell. The number of edges never changes.
"""

from collections.abc import Callable

import numpy as np
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.rounding import top_circuit
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks

MOST_SWAPS = 8
BATCH_SIZE = 64


def refine(
    reference: Reference,
    circuit: Circuit,
    rounds: int,
    most_examples: int = 256,
    on_round: Callable[[int, float], None] | None = None,
) -> Circuit:
    """The circuit after up to ``rounds`` rounds of swaps; its KL on the first ``most_examples`` examples does not rise.

    Args:
        on_round: called with the number of rounds done and the KL so far.
    """
    kl, gradient = _kl_and_gradient(reference, circuit, most_examples)
    swaps, tried = MOST_SWAPS, np.zeros(circuit.graph.num_edges, dtype=bool)
    for number in range(rounds):
        candidate, touched = _swapped(circuit, gradient, swaps, tried)
        if candidate is None:
            break
        new_kl, new_gradient = _kl_and_gradient(reference, candidate, most_examples)
        if new_kl < kl:
            circuit, kl, gradient = candidate, new_kl, new_gradient
            swaps = min(MOST_SWAPS, 2 * swaps)
            tried[:] = False
        elif swaps > 1:
            swaps //= 2
        else:
            tried |= touched
        if on_round is not None:
            on_round(number + 1, kl)
    return circuit


def _swapped(
    circuit: Circuit, gradient: np.ndarray, swaps: int, tried: np.ndarray
) -> tuple[Circuit | None, np.ndarray]:
    """The circuit with ``swaps`` edges swapped, and which edges that touched; None when every edge has been tried."""
    gain = np.where(circuit.keep, np.inf, np.where(tried, -np.inf, -gradient))
    removable = np.flatnonzero(circuit.keep & ~tried)
    if not len(removable) or not np.isfinite(gain[~circuit.keep]).any():
        return None, tried
    out = removable[np.argsort(-gradient[removable], kind="stable")[:swaps]]
    gain[out] = -np.inf
    candidate = top_circuit(circuit.graph, gain, circuit.num_edges, circuit.ablation)
    return candidate, candidate.keep != circuit.keep


def _kl_and_gradient(reference: Reference, circuit: Circuit, most_examples: int) -> tuple[float, np.ndarray]:
    """Mean KL of the circuit, in nats, and its gradient in every edge's mask, kept or not, ``[num_edges]``."""
    model, total = reference.model, 0.0
    mask = Masks.from_circuit(circuit).edge.to(model.device, model.mask_dtype).requires_grad_()
    count = min(most_examples, len(reference))
    for indices in torch.arange(count).split(BATCH_SIZE):
        batch = reference.batch(indices)
        read = model.final_read(batch.token_ids, batch.packing, batch.ablated, Masks(mask), batch.answers.tokens)
        divergence = kl_divergence(batch.answers.log_probs, reference.restrict(model.unembed(read)))
        share = batch.answers.example_mean(divergence, batch.size) * (batch.size / count)
        share.backward()
        total += float(share.detach())
    assert mask.grad is not None
    return total, mask.grad.double().cpu().numpy()

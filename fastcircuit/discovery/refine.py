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
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Batch, Reference
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
    indices = torch.arange(min(most_examples, len(reference)))
    batches = [reference.batch(chunk) for chunk in indices.split(BATCH_SIZE)]
    kl = mean_kl(reference, Masks.from_circuit(circuit), batches)
    gradient = _kl_gradient(reference, circuit, batches)
    swaps, tried = MOST_SWAPS, np.zeros(circuit.graph.num_edges, dtype=bool)
    for number in range(rounds):
        candidate = _swapped(circuit, gradient, swaps, tried)
        if candidate is None:
            break
        new_kl = mean_kl(reference, Masks.from_circuit(candidate), batches)
        if new_kl < kl:
            circuit, kl, gradient = candidate, new_kl, _kl_gradient(reference, candidate, batches)
            swaps = min(MOST_SWAPS, 2 * swaps)
            tried[:] = False
        elif swaps > 1:
            swaps //= 2
        else:
            tried |= candidate.keep != circuit.keep
        if on_round is not None:
            on_round(number + 1, kl)
    return circuit


def _swapped(circuit: Circuit, gradient: np.ndarray, swaps: int, tried: np.ndarray) -> Circuit | None:
    """The circuit with ``swaps`` edges swapped that have not been ``tried``; None when there are none left."""
    gain = np.where(circuit.keep, np.inf, np.where(tried, -np.inf, -gradient))
    removable = np.flatnonzero(circuit.keep & ~tried)
    if not len(removable) or not np.isfinite(gain[~circuit.keep]).any():
        return None
    out = removable[np.argsort(-gradient[removable], kind="stable")[:swaps]]
    gain[out] = -np.inf
    return top_circuit(circuit.graph, gain, circuit.num_edges, circuit.ablation)


def _kl_gradient(reference: Reference, circuit: Circuit, batches: list[Batch]) -> np.ndarray:
    """Gradient of the circuit's mean KL in every edge's mask, kept or not, ``[num_edges]``."""
    model = reference.model
    mask = Masks.from_circuit(circuit).edge.to(model.device, model.mask_dtype).requires_grad_()
    total = sum(batch.size for batch in batches)
    for batch in batches:
        read = model.final_read(batch.token_ids, batch.packing, batch.ablated, Masks(mask), batch.answers.tokens)
        divergence = kl_divergence(batch.answers.log_probs, reference.restrict(model.unembed(read)))
        (batch.answers.example_mean(divergence, batch.size) * (batch.size / total)).backward()
    assert mask.grad is not None
    return mask.grad.double().cpu().numpy()

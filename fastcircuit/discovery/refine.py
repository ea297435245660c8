"""Refinement of a finished circuit by the KL it really has on training examples: eliminate, regrow, swap.

*Elimination* starts from more edges than asked for, the surest first, and removes the edge whose removal costs least,
measured, until the size is right. Which ones are measured is up to the gradient of the KL, which estimates every
removal's cost to first order, and to how far off the estimate was when an edge was last measured.

*Regrowing* adds the missing edges that the same gradient says gain most, and eliminates as many again, so that edges
that pay only together have a chance; the result is kept if it is better.

*Swapping* uses the gradient of the KL at the hard circuit, which estimates to first order what adding an edge gains and
removing one costs: each round swaps the few kept edges that seem to cost least for the missing ones that seem to gain
most, and keeps the swap only if the measured KL fell. The number of edges never changes.

*Joining* brings in two edges at once, a way through a component that the circuit does not use (see ``joint.py``), and
eliminates two.
"""

from collections.abc import Callable

import numpy as np
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.joint import joint_pairs, with_pair
from fastcircuit.discovery.rounding import top_circuit
from fastcircuit.errors import RunError
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import Batch, Reference
from fastcircuit.masks import Masks
from fastcircuit.models.trunk import Trunk
from fastcircuit.ops.memory import Result, free_cached_memory, with_less

MOST_EXAMPLES = 256
MOST_SWAPS = 8
MOST_MEASURED = 4
LEAST_TO_REGROW = 4
MOST_JOINS = 4
MOST_PAIRS = 4
BATCH_SIZE = 256

OnRound = Callable[[str, int, int, float], None]


class Refiner:
    """Measures circuits on the first ``most_examples`` of ``reference``.

    Args:
        on_round: called with the stage (``eliminate``, ``regrow``, ``swap``, ``join``), its rounds done, the most there
            are, and the KL so far.
        on_note: called with a line when memory runs out and smaller batches are used from then on.
    """

    def __init__(
        self,
        reference: Reference,
        most_examples: int = MOST_EXAMPLES,
        on_round: OnRound | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.reference = reference
        self.num_examples = min(most_examples, len(reference))
        self.batch_size = min(BATCH_SIZE, self.num_examples)
        self.on_round, self.on_note = on_round, on_note
        self._batches: list[Batch] = []
        self._trunk: Trunk | None = None

    @property
    def batches(self) -> list[Batch]:
        """The examples, made once."""
        if not self._batches:
            indices = torch.arange(self.num_examples)
            self._batches = [self.reference.batch(chunk) for chunk in indices.split(self.batch_size)]
        return self._batches

    def kl(self, circuit: Circuit) -> float:
        """The circuit's mean KL, in nats."""
        return self._fitting(lambda: mean_kl(self.reference, Masks.from_circuit(circuit), self.batches))

    def _kl_without(self, edge: int, circuit: Circuit) -> float:
        """The KL of ``circuit``, the one of the latest gradient less ``edge``, below which layers are the same."""
        masks = Masks.from_circuit(circuit)
        layer = next(site.layer for site in circuit.graph.sites if edge < site.edge_slice.stop)

        def measure() -> float:
            trunk = None if self._trunk is None else self._trunk.up_to(layer)
            return mean_kl(self.reference, masks, self.batches, trunk)

        return self._fitting(measure)

    def _fitting(self, measure: Callable[[], Result]) -> Result:
        """What ``measure`` returns, with batches that fit into memory."""
        return with_less(measure, self.reference.model.device, self._halve_batches)

    def _halve_batches(self) -> None:
        self._batches, self._trunk = [], None
        if self.batch_size == 1:
            raise RunError(
                f"refinement: out of memory with one example at a time; free memory on {self.reference.model.device}, "
                "use shorter prompts, or leave it out (refine=False)"
            )
        self.batch_size //= 2
        free_cached_memory(self.reference.model.device)
        if self.on_note is not None:
            self.on_note(f"out of memory in refinement: going on with {self.batch_size} examples at a time")

    def eliminate(self, circuit: Circuit, num_edges: int) -> Circuit | None:
        """Remove edges, the cheapest first, until ``num_edges`` are left; None when no removal ends at that number."""
        found = self._eliminate(circuit, num_edges, "eliminate", 0, circuit.num_edges - num_edges)
        return None if found is None else found[1]

    def eliminate_within(self, circuit: Circuit, budget: float) -> Circuit:
        """Remove edges, the cheapest first, while the KL stays within ``budget``: no one edge of the result can go."""
        found = self._eliminate(circuit, 0, "eliminate", 0, circuit.num_edges, budget)
        assert found is not None
        return found[1]

    def _eliminate(
        self, circuit: Circuit, num_edges: int, stage: str, done: int, most: int, budget: float = np.inf
    ) -> tuple[float, Circuit] | None:
        before = done + circuit.num_edges
        kl, error = self.kl(circuit), np.zeros(circuit.graph.num_edges)
        while circuit.num_edges > num_edges:
            linear = kl - self._gradient(circuit, kept_only=True)
            best = self._cheapest(circuit, num_edges, linear, error, budget)
            self._trunk = None
            if best is None:
                return None
            if best[0] > budget:
                break
            kl, circuit = best
            self._report(stage, before - circuit.num_edges, most, kl)
        return kl, circuit

    def _cheapest(
        self, circuit: Circuit, num_edges: int, linear: np.ndarray, error: np.ndarray, budget: float
    ) -> tuple[float, Circuit] | None:
        """The removal of one edge that costs least, with its KL: of those that promise most, measured.

        Args:
            linear: KL without each edge, to first order, ``[num_edges]``.
            error: what measuring added to that when an edge was last measured; brought up to date.
            budget: until a removal within it is found, all are measured. (Where the KL is 0, so is its gradient.)
        """
        best: tuple[float, Circuit] | None = None
        measured = 0
        expected = linear + error
        kept = np.flatnonzero(circuit.keep)
        for edge in kept[np.argsort(expected[kept], kind="stable")].tolist():
            found = best is not None and best[0] <= budget
            if found and (measured >= MOST_MEASURED or best[0] <= expected[edge]):  # type: ignore[index]
                break
            candidate = _without(circuit, edge)
            if candidate.num_edges < num_edges:
                continue
            kl = self._kl_without(edge, candidate)
            measured += 1
            error[edge] = kl - linear[edge]
            if best is None or kl < best[0]:
                best = kl, candidate
        return best

    def regrow(self, circuit: Circuit, more: int, cycles: int) -> Circuit:
        """Up to ``cycles`` times, add the ``more`` edges that promise most, eliminate as many; the KL does not rise."""
        graph, kl, most = circuit.graph, self.kl(circuit), cycles * more
        for cycle in range(cycles):
            if more < LEAST_TO_REGROW:
                break
            gain = np.where(circuit.keep, np.inf, -self._gradient(circuit))
            size = min(graph.num_edges, circuit.num_edges + more)
            larger = top_circuit(graph, gain, size, circuit.ablation)
            found = self._eliminate(larger, circuit.num_edges, "regrow", cycle * (most // cycles), most)
            if found is not None and found[0] < kl:
                kl, circuit = found
            else:
                more //= 2
        return circuit

    def swap(self, circuit: Circuit, rounds: int) -> Circuit:
        """Up to ``rounds`` rounds of swaps; the KL does not rise."""
        kl, gradient = self.kl(circuit), self._gradient(circuit)
        swaps, tried = MOST_SWAPS, np.zeros(circuit.graph.num_edges, dtype=bool)
        for number in range(rounds):
            candidate = _swapped(circuit, gradient, swaps, tried)
            if candidate is None:
                break
            new_kl = self.kl(candidate)
            if new_kl < kl:
                circuit, kl, gradient = candidate, new_kl, self._gradient(candidate)
                swaps = min(MOST_SWAPS, 2 * swaps)
                tried[:] = False
            elif swaps > 1:
                swaps //= 2
            else:
                tried |= candidate.keep != circuit.keep
            self._report("swap", number + 1, rounds, kl)
        return circuit

    def finish(self, circuit: Circuit, rounds: int) -> Circuit:
        """Up to ``rounds`` rounds of swaps, joint moves, and after those as many swaps again; the KL does not rise."""
        swapped = self.swap(circuit, rounds)
        joined = self.join(swapped, min(rounds, MOST_JOINS))
        return self.swap(joined, rounds) if joined != swapped else swapped

    def join(self, circuit: Circuit, rounds: int) -> Circuit:
        """Up to ``rounds`` times, add two edges that help only together and eliminate two; the KL does not rise."""
        kl = self.kl(circuit)
        for number in range(rounds):
            found = self._joined(circuit, kl, number, rounds)
            if found is None:
                break
            kl, circuit = found
        return circuit

    def _joined(self, circuit: Circuit, kl: float, number: int, rounds: int) -> tuple[float, Circuit] | None:
        """The first circuit with a lower KL than ``kl`` that adding a pair and eliminating two edges ends in."""
        for pair in joint_pairs(circuit, self._gradient, MOST_PAIRS):
            larger = with_pair(circuit, pair)
            if self.kl(larger) >= kl:
                continue
            found = self._eliminate(larger, circuit.num_edges, "join", 2 * number, 2 * rounds)
            if found is not None and found[0] < kl:
                return found
        return None

    def _gradient(self, circuit: Circuit, kept_only: bool = False) -> np.ndarray:
        """Gradient of the circuit's mean KL in every edge's mask, ``[num_edges]``; ``kept_only`` leaves 0 elsewhere."""
        return self._fitting(lambda: self._gradient_of_batches(circuit, kept_only))

    def _gradient_of_batches(self, circuit: Circuit, kept_only: bool) -> np.ndarray:
        reference, model = self.reference, self.reference.model
        trunk = self._trunk = Trunk() if kept_only and len(self.batches) == 1 else None
        mask = Masks.from_circuit(circuit).edge.to(model.device, model.mask_dtype).requires_grad_()
        total = sum(batch.size for batch in self.batches)
        for batch in self.batches:
            read = model.final_read(
                batch.token_ids,
                batch.packing,
                batch.ablated,
                Masks(mask),
                batch.answers.tokens,
                skip_zeros=kept_only,
                trunk=trunk,
                changing=batch.changing,
            )
            divergence = reference.divergence(read, batch.answers.log_probs)
            (batch.answers.example_mean(divergence, batch.size) * (batch.size / total)).backward()
        assert mask.grad is not None
        return mask.grad.double().cpu().numpy()

    def _report(self, stage: str, done: int, most: int, kl: float) -> None:
        if self.on_round is not None:
            self.on_round(stage, done, most, kl)


def _without(circuit: Circuit, edge: int) -> Circuit:
    """The circuit less one edge and whatever that leaves dangling."""
    keep = circuit.keep.copy()
    keep[edge] = False
    return Circuit(circuit.graph, keep, ablation=circuit.ablation).pruned()


def _swapped(circuit: Circuit, gradient: np.ndarray, swaps: int, tried: np.ndarray) -> Circuit | None:
    """The circuit with ``swaps`` edges swapped that have not been ``tried``; None when there are none left."""
    gain = np.where(circuit.keep, np.inf, np.where(tried, -np.inf, -gradient))
    removable = np.flatnonzero(circuit.keep & ~tried)
    if not len(removable) or not np.isfinite(gain[~circuit.keep]).any():
        return None
    out = removable[np.argsort(-gradient[removable], kind="stable")[:swaps]]
    gain[out] = -np.inf
    return top_circuit(circuit.graph, gain, circuit.num_edges, circuit.ablation)

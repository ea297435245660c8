"""What a file of another tool holds: a circuit, perhaps scores, and what only that tool has."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.formats.score_file import best, ranked
from fastcircuit.graph import Graph


@dataclass(frozen=True, eq=False)
class CircuitFile:
    """A circuit as it was read.

    Args:
        format: the tool's name, one of ``fastcircuit.formats.FORMATS``.
        circuit: the edges that the file keeps.
        edge_scores: float64 ``[num_edges]`` in the order of ``circuit.graph.edges``, as the tool gave them.
        node_scores: float64 ``[num_writers]``.
        log_alpha: the scores are Edge Pruning's log-alphas, of which the lowest are removed first, not the smallest.
        about: the tool's own fields, for writing the file as it was.
    """

    format: str
    circuit: Circuit
    edge_scores: np.ndarray | None = None
    node_scores: np.ndarray | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    log_alpha: bool = False

    @property
    def graph(self) -> Graph:
        return self.circuit.graph

    def top(self, edges: int, absolute: bool = True) -> Circuit:
        """The circuit of the ``edges`` best edges by score, or by its size; ties in canonical order.

        Raises:
            InputError: the file has no scores, or the graph has not so many edges.
        """
        if self.edge_scores is None:
            raise InputError(
                f"this {self.format} circuit has no scores to rank edges by; leave out the number of edges"
            )
        if not 1 <= edges <= self.graph.num_edges:
            raise InputError(f"edges is {edges}; this graph has 1 to {self.graph.num_edges} edges to keep")
        return replace(self.circuit, keep=best(ranked(self.edge_scores, absolute, self.log_alpha), edges))


def check_scores(names: list[str], scores: np.ndarray, what: str) -> None:
    """InputError naming the first score that is NaN or infinite."""
    wrong = ~np.isfinite(scores)
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"{int(wrong.sum())} {what} score(s) are no finite numbers, the first of {names[first]} ({scores[first]}); "
            "they have no rank, mend or recompute them"
        )

"""Recovery of a circuit that is known: true and false positives, ROC curves and the area under them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.manual_circuits import ManualCircuit, manual_circuit, manual_circuit_names
from fastcircuit.graph import Graph


@dataclass(frozen=True)
class Truth:
    """A circuit that is known, over ``graph``.

    Args:
        edges: bool ``[num_edges]``; None when only its heads are known.
        writers: bool ``[num_writers]``.
        scope: numbers of the writers it says anything about: heads, and MLPs where edges are known. Embeddings are no
            components: they are in every circuit.
    """

    graph: Graph
    edges: np.ndarray | None
    writers: np.ndarray
    scope: np.ndarray

    @classmethod
    def of(cls, circuit: Circuit) -> "Truth":
        """What ``circuit`` keeps."""
        scope = np.arange(circuit.graph.num_embedding_writers, circuit.graph.num_writers)
        return cls(circuit.graph, circuit.keep, circuit.writer_kept, scope)

    @classmethod
    def load(cls, name_or_path: str, graph: Graph) -> "Truth":
        """A manual circuit by name, or a circuit file.

        Raises:
            InputError: neither, or one of another graph.
        """
        if name_or_path in manual_circuit_names():
            return cls._manual(manual_circuit(name_or_path, graph), graph)
        if not Path(name_or_path).exists():
            known = ", ".join(manual_circuit_names())
            raise InputError(f"no manual circuit and no file {name_or_path!r}; manual circuits are {known}")
        return cls.of(Circuit.load(name_or_path, graph))

    @classmethod
    def _manual(cls, manual: ManualCircuit, graph: Graph) -> "Truth":
        writers = np.array([name in manual.nodes for name in graph.writers])
        if manual.circuit is not None:
            return cls(graph, manual.circuit.keep, writers, cls.of(manual.circuit).scope)
        return cls(graph, None, writers, np.array([i for i, name in enumerate(graph.writers) if ".h" in name]))


@dataclass(frozen=True)
class Roc:
    """True against false positive rate as the threshold falls, from (0, 0) to (1, 1).

    Args:
        thresholds: a component is found when it scores at least this; the first is infinite.
        auc: area under the curve: the chance that a component of the truth outscores another one (ties count half).
    """

    thresholds: np.ndarray
    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the first threshold, which is infinite, is None."""
        return {
            "auc": self.auc,
            "thresholds": [None, *self.thresholds[1:].tolist()],
            "false_positive_rate": self.false_positive_rate.tolist(),
            "true_positive_rate": self.true_positive_rate.tolist(),
        }


def rates(found: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Of what was found, bool ``[n]``, against what is true, bool ``[n]``.

    Returns:
        ``tpr`` (found of the true ones), ``fpr`` (found of the others), ``precision`` (true of the found ones); None
        where there is nothing to take a share of.
    """
    _check_shapes(found, truth)
    hits = int((found & truth).sum())
    false = int((found & ~truth).sum())
    return {
        "tpr": hits / int(truth.sum()) if truth.any() else None,
        "fpr": false / int((~truth).sum()) if not truth.all() else None,
        "precision": hits / int(found.sum()) if found.any() else None,
    }


def roc(scores: np.ndarray, truth: np.ndarray) -> Roc:
    """The curve over all thresholds of ``scores`` ``[n]``; equal scores are found together.

    Raises:
        InputError: a score that is NaN, or a truth that holds all or nothing.
    """
    _check_shapes(scores, truth)
    if np.isnan(scores).any():
        raise InputError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; NaN has no rank")
    if truth.all() or not truth.any():
        raise InputError(f"the truth holds {int(truth.sum())} of {len(truth)}; a ROC curve needs some in and some out")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], truth[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of every group of equal scores
    tpr = np.append(0, np.cumsum(hits)[last] / hits.sum())
    fpr = np.append(0, np.cumsum(~hits)[last] / (~hits).sum())
    return Roc(np.append(np.inf, ranked[last]), fpr, tpr, float(np.trapezoid(tpr, fpr)))


def compare_with_truth(circuit: Circuit, truth: Truth) -> dict[str, Any]:
    """:func:`rates` of a circuit's ``edges`` (None when no edges are known) and ``nodes``."""
    _check_graphs(circuit.graph, truth.graph)
    return {
        "edges": None if truth.edges is None else rates(circuit.keep, truth.edges),
        "nodes": rates(circuit.writer_kept[truth.scope], truth.writers[truth.scope]),
    }


def heads_rates(heads: Sequence[Sequence[int]], truth: Truth) -> dict[str, float | None]:
    """:func:`rates` of the kept heads of every layer, such as an extraction's, among all heads."""
    graph = truth.graph
    first = [graph.head_writer(layer) for layer in range(graph.num_layers)]
    places = np.array(first)[:, None] + np.arange(graph.num_heads)
    found = np.zeros(graph.num_writers, dtype=bool)
    for layer, kept in enumerate(heads):
        found[places[layer, list(kept)]] = True
    return rates(found[places.flatten()], truth.writers[places.flatten()])


def truth_roc(edge_scores: np.ndarray, node_scores: np.ndarray, truth: Truth) -> dict[str, Roc | None]:
    """:func:`roc` of ``edges`` and ``nodes``, from scores ``[num_edges]`` and ``[num_writers]``."""
    return {
        "edges": None if truth.edges is None else roc(edge_scores, truth.edges),
        "nodes": roc(node_scores[truth.scope], truth.writers[truth.scope]),
    }


def _check_graphs(own: Graph, known: Graph) -> None:
    if own != known:
        raise InputError(f"the known circuit is over {known}, the other over {own}")


def _check_shapes(values: np.ndarray, truth: np.ndarray) -> None:
    if values.shape != truth.shape or values.ndim != 1:
        raise InputError(f"shapes {values.shape} and {truth.shape} differ; both must be [n], over the same components")

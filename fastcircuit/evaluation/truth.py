"""Recovery of a circuit that is known: true and false positives, ROC curves and the area under them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError


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


def compare_with_truth(circuit: Circuit, truth: Circuit) -> dict[str, Any]:
    """Rates of a circuit's edges, and of the heads and MLPs it reads from, against those of a known circuit.

    Embeddings are no components: they are in every circuit.
    """
    _check_graphs(circuit, truth)
    inner = inner_writers(truth)
    return {
        "edges": rates(circuit.keep, truth.keep),
        "nodes": rates(circuit.writer_kept[inner], truth.writer_kept[inner]),
    }


def truth_roc(edge_scores: np.ndarray, node_scores: np.ndarray, truth: Circuit) -> dict[str, Roc]:
    """ROC curves of edges and of heads and MLPs, from scores ``[num_edges]`` and ``[num_writers]``."""
    inner = inner_writers(truth)
    return {"edges": roc(edge_scores, truth.keep), "nodes": roc(node_scores[inner], truth.writer_kept[inner])}


def inner_writers(circuit: Circuit) -> slice:
    """The heads and MLPs among the writers."""
    return slice(circuit.graph.num_embedding_writers, circuit.graph.num_writers)


def _check_graphs(circuit: Circuit, truth: Circuit) -> None:
    if circuit.graph != truth.graph:
        raise InputError(f"the known circuit is over {truth.graph}, the other over {circuit.graph}")


def _check_shapes(values: np.ndarray, truth: np.ndarray) -> None:
    if values.shape != truth.shape or values.ndim != 1:
        raise InputError(f"shapes {values.shape} and {truth.shape} differ; both must be [n], over the same components")

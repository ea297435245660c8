"""How well a sweep recovers a circuit that is known: ROC curves from scores, or through circuits of several sizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import Scores
from fastcircuit.evaluation.truth import Truth, compare_with_truth, truth_roc
from fastcircuit.report.plots import Values
from fastcircuit.sweep.plan import is_attribution
from fastcircuit.sweep.runner import Sweep

KINDS = ("edges", "nodes")


@dataclass(frozen=True)
class Curve:
    """True positive rate over the false one, from (0, 0) to (1, 1), and the area under it."""

    fpr: Values
    tpr: Values
    auc: float


def method_curves(sweep: Sweep, truth: Truth, method: str, seed: int) -> dict[str, Curve | None]:
    """The curves of ``edges`` and ``nodes`` of one method and seed; None where the truth says nothing of a kind.

    An attribution's follow from its scores; another method's lead through its finished circuits.
    """
    if is_attribution(method):
        scores = Scores.load(sweep.scores_path(method, seed), sweep.model.graph, sweep.plan.ablation)
        curves = truth_roc(scores.ranking(), scores.node_ranking(), truth)
        return {
            kind: None if roc is None else Curve(roc.false_positive_rate, roc.true_positive_rate, roc.auc)
            for kind, roc in curves.items()
        }
    jobs = [job for job in sweep.finished if (job.method, job.seed) == (method, seed)]
    found = [compare_with_truth(Circuit.load(sweep.path(job)), truth) for job in jobs]
    return {kind: curve_through(rates[kind] for rates in found) for kind in KINDS}


def curve_through(found: Iterable[dict[str, Any] | None]) -> Curve | None:
    """The curve from nothing (0, 0) through the rates of what was found to everything (1, 1), by trapezoids.

    None when a rate is not known (see :func:`fastcircuit.evaluation.truth.rates`), or there are none.
    """
    points = [(rate["fpr"], rate["tpr"]) if rate else (None, None) for rate in found]
    if not points or any(value is None for point in points for value in point):
        return None
    fpr, tpr = zip(*sorted([(0.0, 0.0), *points, (1.0, 1.0)]), strict=True)
    return Curve(fpr, tpr, float(np.trapezoid(tpr, fpr)))

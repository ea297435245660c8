"""Circuit extraction in a sweep: sizes and accuracies over thresholds, for every ablation, with MLPs and without."""

import time
from typing import Any

from fastcircuit.extraction.prune import Pruning, sweep
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

ABLATIONS = ("mean", "zero")


def extraction_rows(model: MaskedCausalLM, task: Task, seed: int) -> list[dict[str, Any]]:
    """One row per ablation, treatment of MLPs and threshold (figures 2 and 3 of the circuit extraction paper).

    ``size`` is the fraction of parameters that remain, ``heads`` the kept heads of every layer; metrics are on test.
    ``seconds`` is what all thresholds of an ablation took together: they share their work.
    """
    rows = []
    for ablation in ABLATIONS:
        for mlps in (True, False):
            started = time.perf_counter()
            points = sweep(model, task, ablation=ablation, include_mlps=mlps, seed=seed).points
            about = {"ablation": ablation, "mlps": mlps, "seed": seed}
            seconds = {"seconds": time.perf_counter() - started}
            rows += [{**about, **_row(point), **seconds} for point in points]
    return rows


def _row(point: Pruning) -> dict[str, Any]:
    means = {name: point.metrics[name].mean for name in ("kl", "accuracy", "model_accuracy")}
    heads = [[int(head) for head in row.nonzero()[0]] for row in point.kept.heads]
    return {"threshold": point.threshold, "size": point.size, "validation_kl": point.kl, **means, "heads": heads}

"""What a sweep found as rows: one per circuit, one per extracted model."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.evaluation.registry import METRICS
from fastcircuit.evaluation.truth import Truth, compare_with_truth, heads_rates
from fastcircuit.files import read_json, write_json, write_text
from fastcircuit.sweep.plan import EXTRACTION
from fastcircuit.sweep.recovery import curve_through, method_curves
from fastcircuit.sweep.runner import Sweep


def circuit_rows(sweep: Sweep, truth: Truth | None = None) -> list[dict[str, Any]]:
    """Method, seed, threshold, edges, sparsity, seconds and every metric of each finished circuit.

    ``notes`` is there where memory ran out and the run went on with less at a time.
    ``seconds`` is what finding it took, None for runs from before that was kept; all sizes of an attribution share its
    scores, and have the time of those. With a known circuit also ``edges_tpr``, ``edges_fpr``, ``nodes_tpr``,
    ``nodes_fpr`` and, of the curve that the circuit is on, ``edges_auc`` and ``nodes_auc``.
    """
    rows, curves = [], {}
    for job in sweep.finished:
        if job.method == EXTRACTION:
            continue
        circuit = Circuit.load(sweep.path(job), sweep.model.graph)
        row = {
            "method": job.method,
            "seed": job.seed,
            "threshold": job.threshold,
            "edges": circuit.num_edges,
            "sparsity": circuit.sparsity,
            "seconds": circuit.provenance.get("seconds"),
            **circuit.metrics[sweep.plan.split],
        }
        if "notes" in circuit.provenance:
            row["notes"] = "; ".join(circuit.provenance["notes"])
        if truth is not None:
            key = job.method, job.seed
            if key not in curves:
                curves[key] = method_curves(sweep, truth, *key)
            row |= _recovered(circuit, truth)
            row |= {f"{kind}_auc": curve.auc for kind, curve in curves[key].items() if curve is not None}
        rows.append(row)
    return rows


def _recovered(circuit: Circuit, truth: Truth) -> dict[str, float | None]:
    found = compare_with_truth(circuit, truth)
    return {f"{kind}_{rate}": found[kind][rate] for kind in found if found[kind] for rate in ("tpr", "fpr")}


def extraction_rows(sweep: Sweep, truth: Truth | None = None) -> list[dict[str, Any]]:
    """One row per extracted model (see :func:`fastcircuit.sweep.extraction.extraction_rows`).

    With a known circuit also ``tpr`` and ``fpr`` of its heads, and ``auc`` of the curve through all thresholds.
    """
    paths = [sweep.path(job) for job in sweep.finished if job.method == EXTRACTION]
    rows = [row for path in paths for row in read_json(path, "run")["rows"]]
    if truth is None:
        return rows
    found = [heads_rates(row["heads"], truth) for row in rows]
    rows = [{**row, "tpr": rate["tpr"], "fpr": rate["fpr"]} for row, rate in zip(rows, found, strict=True)]
    for _, group in _grouped(rows, ("ablation", "mlps", "seed")):
        curve = curve_through(group)
        for row in group:
            row["auc"] = None if curve is None else curve.auc
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of every metric, for each method at each size (ACDC: each threshold)."""
    sized = [{**row, "size": row["edges"] if row["threshold"] is None else row["threshold"]} for row in rows]
    names = ("edges", "sparsity", "seconds", *METRICS, "edges_auc", "nodes_auc")
    return [
        {"method": method, "threshold": group[0]["threshold"], "seeds": len(group), **_means(group, names)}
        for (method, _), group in _grouped(sized, ("method", "size"))
    ]


def extraction_summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of sizes, metrics and rates, for each ablation, treatment of MLPs and threshold."""
    keys = ("ablation", "mlps", "threshold")
    names = ("size", "validation_kl", "kl", "accuracy", "model_accuracy", "seconds", "tpr", "fpr", "auc")
    return [
        {**dict(zip(keys, values, strict=True)), "seeds": len(group), **_means(group, names)}
        for values, group in _grouped(rows, keys)
    ]


def _grouped(
    rows: Sequence[dict[str, Any]], keys: Sequence[str]
) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows that have the same values of ``keys``, in the order in which the values come up."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def _means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Means and, as ``NAME_deviation``, sample deviations of the columns that have any numbers."""
    found: dict[str, float | None] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = float(np.mean(values))
            found[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def write_tables(sweep: Sweep, directory: Path, truth: Truth | None = None) -> list[Path]:
    """Write ``circuits.csv``, ``extraction.csv``, a summary of each, and all of it as ``sweep.json``."""
    circuits, extracted = circuit_rows(sweep, truth), extraction_rows(sweep, truth)
    tables = {
        "circuits": circuits,
        "summary": summary(circuits),
        "extraction": extracted,
        "extraction_summary": extraction_summary(extracted),
    }
    written = []
    for name, rows in tables.items():
        if rows:
            columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "heads"]
            written.append(directory / f"{name}.csv")
            write_text(written[-1], _csv(rows, columns))
    written.append(directory / "sweep.json")
    write_json(written[-1], {"plan": sweep.plan.fixed(), **tables})
    return written


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value

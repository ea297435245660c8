"""What a sweep found as rows: one per circuit, one per extracted model."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.evaluation.registry import METRICS
from fastcircuit.evaluation.truth import Truth, compare_with_truth, heads_rates
from fastcircuit.files import read_json, write_json, write_text
from fastcircuit.sweep.plan import EXTRACTION
from fastcircuit.sweep.runner import Sweep


def circuit_rows(sweep: Sweep, truth: Truth | None = None) -> list[dict[str, Any]]:
    """Method, seed, threshold, edges, sparsity and every metric of each finished circuit.

    With a known circuit also ``edges_tpr``, ``edges_fpr``, ``nodes_tpr``, ``nodes_fpr``.
    """
    rows = []
    for job in sweep.finished:
        if job.method == EXTRACTION:
            continue
        circuit = Circuit.load(sweep.path(job), sweep.model.graph)
        rows.append(
            {
                "method": job.method,
                "seed": job.seed,
                "threshold": job.threshold,
                "edges": circuit.num_edges,
                "sparsity": circuit.sparsity,
                **circuit.metrics[sweep.plan.split],
                **(_recovered(circuit, truth) if truth else {}),
            }
        )
    return rows


def _recovered(circuit: Circuit, truth: Truth) -> dict[str, float | None]:
    found = compare_with_truth(circuit, truth)
    return {f"{kind}_{rate}": found[kind][rate] for kind in found if found[kind] for rate in ("tpr", "fpr")}


def extraction_rows(sweep: Sweep, truth: Truth | None = None) -> list[dict[str, Any]]:
    """One row per extracted model (see :func:`fastcircuit.sweep.extraction.extraction_rows`).

    With a known circuit also ``tpr`` and ``fpr`` of its heads.
    """
    paths = [sweep.path(job) for job in sweep.finished if job.method == EXTRACTION]
    rows = [row for path in paths for row in read_json(path, "run")["rows"]]
    if truth is None:
        return rows
    found = [heads_rates(row["heads"], truth) for row in rows]
    return [{**row, "tpr": rate["tpr"], "fpr": rate["fpr"]} for row, rate in zip(rows, found, strict=True)]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of every metric, for each method at each size (ACDC: each threshold)."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        size = row["edges"] if row["threshold"] is None else row["threshold"]
        groups.setdefault((row["method"], size), []).append(row)
    found = []
    for (method, _), group in groups.items():
        line: dict[str, Any] = {"method": method, "threshold": group[0]["threshold"], "seeds": len(group)}
        for name in ("edges", "sparsity", *METRICS):
            values = [row[name] for row in group if row.get(name) is not None]
            if values:
                line[name] = float(np.mean(values))
                line[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found.append(line)
    return found


def write_tables(sweep: Sweep, directory: Path, truth: Truth | None = None) -> list[Path]:
    """Write ``circuits.csv``, ``summary.csv``, ``extraction.csv`` and all of it as ``sweep.json``."""
    circuits, extracted = circuit_rows(sweep, truth), extraction_rows(sweep, truth)
    short = summary(circuits)
    tables = {"circuits.csv": circuits, "summary.csv": short, "extraction.csv": extracted}
    written = []
    for name, rows in tables.items():
        if rows:
            columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "heads"]
            written.append(directory / name)
            write_text(written[-1], _csv(rows, columns))
    written.append(directory / "sweep.json")
    plan = sweep.plan.fixed()
    write_json(written[-1], {"plan": plan, "circuits": circuits, "summary": short, "extraction": extracted})
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

"""The papers' plots of a sweep: metrics against sparsity, accuracy against size, alpha against size, ROC."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.evaluation.registry import METRICS
from fastcircuit.evaluation.truth import Truth
from fastcircuit.report.plots import Line, Panel, save_plot
from fastcircuit.sweep.plan import EXTRACTION, METHODS, is_attribution
from fastcircuit.sweep.recovery import curve_through, method_curves
from fastcircuit.sweep.runner import Sweep
from fastcircuit.sweep.tables import circuit_rows, extraction_rows

ABLATION_LABELS = {"mean": "mean ablation", "zero": "zero ablation"}
PRUNED_LABELS = {True: "heads and MLPs", False: "heads alone"}


def write_plots(sweep: Sweep, directory: Path, truth: Truth | None = None) -> list[Path]:
    """Write ``circuits`` and ``extraction``, with a known circuit ``roc`` and ``extraction_roc``, as SVG and PNG."""
    plan, written = sweep.plan, []
    title = f"{Path(plan.model).name}, {Path(plan.task).stem}, {plan.split} split"
    rows, extracted = circuit_rows(sweep), extraction_rows(sweep, truth)
    if rows:
        written += save_plot(circuit_panels(rows), directory / "circuits", f"{title}: circuits")
    if extracted:
        written += save_plot(extraction_panels(extracted), directory / "extraction", f"{title}: extracted models")
    if truth is not None:
        for name, panels in (("roc", roc_panels(sweep, truth)), ("extraction_roc", extraction_roc_panels(extracted))):
            if panels:
                written += save_plot(panels, directory / name, f"{title}: the known circuit recovered")
    return written


def circuit_panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Every metric against sparsity: mean over seeds, and the band from the least to the most."""
    panels = []
    for name, metric in METRICS.items():
        known = [row for row in rows if row.get(name) is not None]
        if not known:
            continue
        own = [row[f"model_{name}"] for row in known if row.get(f"model_{name}") is not None]
        panels.append(
            Panel(
                "edges removed, %",
                metric.label,
                [_seeds_line(known, method, name) for method in METHODS if any(r["method"] == method for r in known)],
                log_y=name == "kl" and min(row[name] for row in known) > 0,
                level=("full model", float(np.mean(own))) if own else None,
            )
        )
    return panels


def _seeds_line(rows: Sequence[dict[str, Any]], method: str, name: str) -> Line:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] == method:
            groups.setdefault(row["edges"] if row["threshold"] is None else row["threshold"], []).append(row)
    points = sorted(
        (100 * np.mean([row["sparsity"] for row in group]), [row[name] for row in group]) for group in groups.values()
    )
    return Line(
        method,
        [float(x) for x, _ in points],
        [float(np.mean(values)) for _, values in points],
        [min(values) for _, values in points],
        [max(values) for _, values in points],
        METHODS.index(method),
    )


def extraction_panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Accuracy against size and size against the threshold alpha, means over seeds (circuit extraction, figs. 2, 3)."""
    by_size, by_alpha = [], []
    styles = {ablation: style for style, ablation in enumerate(sorted({row["ablation"] for row in rows}))}
    for some, ablation, mlps in _extracted(rows):
        label, style = f"{ABLATION_LABELS[ablation]}, {PRUNED_LABELS[mlps]}", styles[ablation]
        alphas = sorted({row["threshold"] for row in some})
        means = [
            [float(np.mean([row[name] for row in some if row["threshold"] == alpha])) for alpha in alphas]
            for name in ("size", "accuracy")
        ]
        order = np.argsort(means[0], kind="stable")
        sizes, accuracies = (np.array(values) for values in means)
        by_size.append(Line(label, 100 * sizes[order], accuracies[order], style=style, dashed=not mlps))
        by_alpha.append(Line(label, alphas, 100 * sizes, style=style, dashed=not mlps))
    full = float(np.mean([row["model_accuracy"] for row in rows]))
    return [
        Panel("parameters that remain, % (no embeddings)", "accuracy", by_size, level=("full model", full)),
        Panel("threshold alpha, nats", "parameters that remain, % (no embeddings)", by_alpha, log_x=True),
    ]


def _extracted(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], str, bool]]:
    """The rows of every ablation, with MLPs and without; the ablation, and whether MLPs could go."""
    for ablation in sorted({row["ablation"] for row in rows}):
        for mlps in sorted({row["mlps"] for row in rows}):
            yield [row for row in rows if (row["ablation"], row["mlps"]) == (ablation, mlps)], ablation, mlps


def roc_panels(sweep: Sweep, truth: Truth) -> list[Panel]:
    """ROC curves of edges and of heads and MLPs, first seed: from scores, or through the circuits of every size."""
    methods = dict.fromkeys(job.method for job in sweep.finished if job.method != EXTRACTION)
    curves = {method: method_curves(sweep, truth, method, sweep.plan.seeds[0]) for method in methods}
    panels = []
    for kind, label in (("edges", "edges"), ("nodes", "heads and MLPs")):
        lines = []
        for method, found in curves.items():
            curve = found[kind]
            if curve is not None:
                dashed = not is_attribution(method)
                lines.append(Line(method, curve.fpr, curve.tpr, style=METHODS.index(method), dashed=dashed))
        if lines:
            panels.append(_roc_panel(lines, label))
    return panels


def extraction_roc_panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """ROC curves of the heads that are kept as the threshold varies, by ablation (circuit extraction, figs. 8 and 9).

    Rates are means over seeds, and so are the areas that the titles name.
    """
    known = [row for row in rows if row["tpr"] is not None and row["fpr"] is not None]
    panels: dict[str, tuple[list[Line], list[str]]] = {}
    for some, ablation, mlps in _extracted(known):
        alphas = sorted({row["threshold"] for row in some})
        groups = [[row for row in some if row["threshold"] == alpha] for alpha in alphas]
        rates = [{name: float(np.mean([row[name] for row in group])) for name in ("tpr", "fpr")} for group in groups]
        curve = curve_through(rates)
        assert curve is not None
        lines, areas = panels.setdefault(ABLATION_LABELS[ablation], ([], []))
        lines.append(Line(PRUNED_LABELS[mlps], curve.fpr, curve.tpr, style=int(mlps), dashed=not mlps))
        areas.append(f"{PRUNED_LABELS[mlps]} {np.mean([row['auc'] for row in some]):.2f}")
    return [_roc_panel(lines, f"heads, {label}\nAUC: {', '.join(areas)}") for label, (lines, areas) in panels.items()]


def _roc_panel(lines: Sequence[Line], title: str) -> Panel:
    return Panel("false positive rate", "true positive rate", lines, title=title, diagonal=True)

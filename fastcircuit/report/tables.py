"""Tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from fastcircuit.circuit import Circuit
from fastcircuit.evaluation.registry import METRICS

_ITSELF = {"kl": "0", "exact_match": "1", "kendall_tau": "1"}  # the full model compared with itself


def metrics_table(circuit: Circuit) -> Group:
    """A circuit's size and its metrics with their intervals, circuit beside full model where both exist."""
    graph = circuit.graph
    head = (
        f"{circuit.num_edges} of {graph.num_edges} edges ({circuit.sparsity:.1%} removed), {len(circuit.nodes)} writers"
    )
    parts: list[Any] = [head]
    for split, metrics in circuit.metrics.items():
        table = Table(
            "metric", "circuit", "full model", title=f"{circuit.task or 'task'}, {split}", title_justify="left"
        )
        for name, metric in METRICS.items():
            if name in metrics:
                own = _number(metrics, f"model_{name}") if metric.of_model else _ITSELF[name]
                table.add_row(metric.label, _number(metrics, name) + _interval(metrics, name), own)
        parts += [table, f"on {metrics['examples']} prompts"]
    return Group(*parts)


def plan_table(found: dict[str, Any]) -> Group:
    """The memory that a run is predicted to need (see ``Plan.to_dict``)."""
    table = Table("memory", "GB", title=f"on {found['device']}", title_justify="left")
    for label, key in (
        ("weights", "weights"),
        ("cached states and answers", "cache"),
        ("masks and their optimizer", "learned"),
        ("a step, forward and backward", "step"),
        ("together", "total"),
        ("free", "free"),
    ):
        table.add_row(label, f"{found[key] / 1e9:.2f}")
    blocks = "computed again in the backward pass" if found["recompute"] else "kept for the backward pass"
    how = f"{found['micro_batch']} examples at a time ({found['tokens']} tokens), blocks {blocks}"
    return Group(table, how, *([] if found["fits"] else ["this does not fit; use a narrower dtype or shorter prompts"]))


def overlap_table(found: dict[str, Any], first: str, second: str) -> Table:
    """What :func:`fastcircuit.evaluation.overlap.overlap` found, with the files' names."""
    table = Table("edges", "count", title=f"{first} and {second}", title_justify="left")
    for label, key in (
        (f"in {first}", "first"),
        (f"in {second}", "second"),
        ("in both", "intersection"),
        ("in either", "union"),
    ):
        table.add_row(label, str(found[key]))
    table.add_row("in both, expected by chance", f"{found['expected_by_chance']:.2f}")
    for label, key in (
        ("ratio to chance", "ratio_to_chance"),
        ("in both, of the smaller", "fraction_of_smaller"),
        ("in both, of either (Jaccard)", "jaccard"),
    ):
        table.add_row(label, _number(found, key))
    return table


def extraction_table(found: dict[str, Any], task: str) -> Group:
    """What an extraction kept and was measured to be (see ``Extraction.to_dict``), with 95 % intervals."""
    kept = Table("layer", "heads", "MLP", title="kept", title_justify="left")
    for layer, heads in enumerate(found["heads"]):
        kept.add_row(str(layer), ", ".join(map(str, heads)) or "-", "yes" if layer in found["mlps"] else "-")
    sizes = Table("parameters", "original", "submodel", "smaller by")
    for name, key in (("all", "parameters"), ("without embeddings", "parameters_without_embeddings")):
        before, after = found[key]["original"], found[key]["submodel"]
        sizes.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}")
    metrics = Table("metric", "submodel", "95 % interval", title=f"{task}, test", title_justify="left")
    for name, value in found["test"].items():
        metrics.add_row(name, _number(value, "mean"), f"{value['low']:.4f} to {value['high']:.4f}")
    if found["circuit_kl"] is not None:
        metrics.add_row("KL(edge circuit || submodel), nats", _number(found, "circuit_kl"), "")
    ties = [f"{found['near_ties']} decisions were within rounding of the threshold"] if found["near_ties"] else []
    return Group(kept, sizes, metrics, *ties)


def analysis_tables(found: dict[str, Any]) -> list[Table]:
    """What ``evaluate`` was asked for beyond metrics (see ``fastcircuit.cli.analyses``), a table each."""
    tables = []
    if "faithfulness" in found:
        curve = found["faithfulness"]
        title = f"faithfulness of {curve['metric']}: CPR {_area(curve['cpr'])}, CMD {_area(curve['cmd'])}"
        table = Table("edges", "of all", curve["metric"], "faithfulness", title=title, title_justify="left")
        for point in curve["points"]:
            table.add_row(
                str(point["edges"]),
                f"{point['fraction']:.1%}",
                _number(point, curve["metric"]),
                _number(point, "faithfulness"),
            )
        tables.append(table)
    if "truth" in found:
        table = Table("recovered", "TPR", "FPR", "precision", "AUC of the scores", title_justify="left")
        for kind, rates in found["truth"].items():
            if rates is not None:
                curve = found.get("roc", {}).get(kind) or {}
                table.add_row(
                    kind, *(_number(rates, name) for name in ("tpr", "fpr", "precision")), _number(curve, "auc")
                )
        tables.append(table)
    if "completeness" in found:
        value = found["completeness"]
        table = Table("incompleteness", f"gap in {value['metric']}")
        table.add_row("mean over subsets", _number(value, "mean"))
        table.add_row("worst", _number(value, "worst"))
        tables.append(table)
    if "edge_faithfulness" in found:
        value = found["edge_faithfulness"]
        table = Table("edges alone", "value", title=f"wrote {', '.join(value['files'])}", title_justify="left")
        table.add_row("correlation of model's and circuit's KL", _number(value, "correlation"))
        table.add_row("least rise of the circuit's KL, nats", _number(value["minimality"], "least_rise"))
        table.add_row("edges that raise nothing", str(value["minimality"]["not_needed"]))
        tables.append(table)
    return tables


def cross_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What :func:`fastcircuit.evaluation.cross.cross_evaluate` found: a row per circuit and task."""
    names = [name for name in METRICS if any(name in row for row in rows)]
    table = Table("circuit", "edges", "task", *(METRICS[name].label for name in names))
    for row in rows:
        table.add_row(row["circuit"], str(row["edges"]), row["task"], *(_number(row, name) for name in names))
    return table


def sweep_table(rows: Sequence[dict[str, Any]], task: str, split: str) -> Table:
    """Means over seeds, with deviations, of every method at every size (see ``fastcircuit.sweep.tables.summary``)."""
    names = [name for name in METRICS if any(name in row for row in rows)]
    table = Table("method", "edges", "sparsity", *(METRICS[name].label for name in names), title=f"{task}, {split}")
    for row in rows:
        numbers = [_number(row, name) + _deviation(row, name) for name in names]
        table.add_row(row["method"], f"{row['edges']:.0f}", f"{row['sparsity']:.1%}", *numbers)
    return table


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """Medians and 95th percentiles of both models, the speed-up of the medians, and its bound (see ``SpeedRow``)."""
    title = f"prompts of {rows[0]['tokens']} tokens, ms (median / p95; decode: per token)"
    table = Table("phase", "batch", "original", "submodel", "speed-up", "bound", title=title, title_justify="left")
    for row in rows:
        table.add_row(
            row["phase"],
            str(row["batch"]),
            *(f"{_time(row[f'{which}_ms'])} / {_time(row[f'{which}_p95_ms'])}" for which in ("original", "submodel")),
            f"{row['speedup']:.2f}",
            f"{row['bound']:.2f}",
        )
    return table


def bench_table(rows: list[dict[str, Any]], curves: list[str]) -> Group:
    """Benchmark rows (see :class:`fastcircuit.benchmarks.rows.Row`), a table per case, and the fitted curves."""
    tables = []
    for case in dict.fromkeys((row["suite"], row["name"], row["shape"], row["dtype"]) for row in rows):
        of_case = [row for row in rows if (row["suite"], row["name"], row["shape"], row["dtype"]) == case]
        table = Table(Column(of_case[0]["axis"] or "variant", overflow="fold", min_width=11))
        for column in ("p50, ms", "p20 to p80", "ratio", "95 %", "floor", "MB"):
            table.add_column(column)
        table.title, table.title_justify = ", ".join(case[1:]), "left"
        for row in of_case:
            with_parts = f" (1 of {row['parts']})" if row["parts"] > 1 else ""
            table.add_row(
                row["variant"] + with_parts,
                f"{row['p50_ms']:.4g}",
                f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
                _short(row["ratio"]) + (f" (bound {row['bound']:.3g})" if row["bound"] else ""),
                "-" if row["ratio"] is None else f"{row['ratio_low']:.3g} to {row['ratio_high']:.3g}",
                "-" if row["percent_of_floor"] is None else f"{row['percent_of_floor']:.0f} %",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            )
        tables.append(table)
    return Group(*tables, *curves)


def change_table(changes: list[dict[str, Any]], old: str, new: str) -> Table:
    """What :func:`fastcircuit.benchmarks.compare.compare` found."""
    table = Table("case", title=f"{old} and {new}", title_justify="left")
    for column in ("ms", "speed-up", "ratio", "memory", "verdict"):
        table.add_column(column, no_wrap=True)
    for change in changes:
        table.add_row(
            f"{change['case']}: {change['variant']}",
            f"{change['old_ms']:.3g}, {change['new_ms']:.3g}",
            f"{change['speedup']:.3g} ({change['low']:.3g} to {change['high']:.3g})",
            f"{_short(change['old_ratio'])}, {_short(change['new_ratio'])}",
            _short(change["memory"]),
            change["verdict"],
        )
    return table


def floor_table(checked: list[dict[str, Any]]) -> Table:
    """Ratios beside their floors."""
    table = Table("case", "variant", "floor", "ratio")
    for found in checked:
        table.add_row(found["case"], found["variant"], _short(found["floor"]), _short(found["ratio"]))
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def info_table(found: dict[str, Any]) -> Table:
    """What :func:`fastcircuit.system.system_info` found."""
    table = Table("what", "here", show_lines=True)
    table.add_row(
        "versions", "\n".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    )
    table.add_row("devices", "\n".join(found["devices"]))
    for key in ("backends", "instruction_sets"):
        ready = (f"{name}: {'ready' if reason is None else reason}" for name, reason in found[key].items())
        table.add_row(key.replace("_", " "), "\n".join(ready))
    for key in ("architectures", "models", "tasks"):
        table.add_row(key, ", ".join(found[key]))
    return table


def _interval(metrics: dict[str, Any], name: str) -> str:
    bounds = metrics.get("intervals", {}).get(name)
    return "" if bounds is None else f" ({bounds[0]:.4f} to {bounds[1]:.4f})"


def _area(value: Any) -> str:
    return (
        f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        if isinstance(value, dict)
        else f"{value:.4f}"
    )


def _deviation(values: dict[str, Any], name: str) -> str:
    deviation = values.get(f"{name}_deviation")
    return "" if deviation is None else f" +- {deviation:.3f}"


def _number(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return "-" if value is None else f"{value:.4f}"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"

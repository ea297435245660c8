"""Tables for the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table

from fastcircuit.circuit import Circuit


def metrics_table(circuit: Circuit) -> Group:
    """A circuit's size and its metrics, circuit beside full model where both exist."""
    graph = circuit.graph
    head = (
        f"{circuit.num_edges} of {graph.num_edges} edges ({circuit.sparsity:.1%} removed), {len(circuit.nodes)} writers"
    )
    parts: list[Any] = [head]
    for split, metrics in circuit.metrics.items():
        table = Table(
            "metric", "circuit", "full model", title=f"{circuit.task or 'task'}, {split}", title_justify="left"
        )
        for name, unit, own in (
            ("kl", "KL(full || circuit), nats", "0"),
            ("accuracy", "accuracy", _number(metrics, "model_accuracy")),
            ("exact_match", "same first token", "1"),
            ("logit_difference", "logit difference, nats", _number(metrics, "model_logit_difference")),
        ):
            table.add_row(unit, _number(metrics, name), own)
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


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """Medians of both models, the speed-up, and its bound from the work that is left (see ``SpeedRow``)."""
    table = Table("phase", "batch", "tokens", "original, ms", "submodel, ms", "speed-up", "bound")
    for row in rows:
        table.add_row(
            row["phase"],
            str(row["batch"]),
            str(row["tokens"]),
            f"{row['original_ms']:.2f}",
            f"{row['submodel_ms']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['bound']:.2f}",
        )
    return table


def info_table(found: dict[str, Any]) -> Table:
    """What :func:`fastcircuit.system.system_info` found."""
    table = Table("what", "here", show_lines=True)
    table.add_row(
        "versions", "\n".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    )
    table.add_row("devices", "\n".join(found["devices"]))
    table.add_row(
        "backends",
        "\n".join(f"{name}: {'ready' if reason is None else reason}" for name, reason in found["backends"].items()),
    )
    for key in ("architectures", "models", "tasks"):
        table.add_row(key, ", ".join(found[key]))
    return table


def _number(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return "-" if value is None else f"{value:.4f}"

"""``fastcircuit compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import AsJson, Device, Dtype, EmbeddingNodes, InDtype, OnDevice, Seed
from fastcircuit.cli.sources import check_circuit, check_source, load_model, load_task
from fastcircuit.errors import InputError


def compare(
    first: Annotated[Path, typer.Argument(help="A circuit.json.")],
    second: Annotated[Path, typer.Argument(help="A circuit.json over the same graph.")],
    intersection: Annotated[Path | None, typer.Option(help="Write the common edges as a circuit.")] = None,
    union: Annotated[Path | None, typer.Option(help="Write all edges of both as a circuit.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Their model: run both, what they share and all they have on --tasks.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks by name, JSONL or .csv file, separated by commas.")] = None,
    split: Annotated[str, typer.Option(help="Split of the tasks.")] = "test",
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Overlap of two circuits; can write their intersection and union, and run all on tasks."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.evaluation.cross import cross_evaluate
    from fastcircuit.evaluation.overlap import overlap
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import cross_table, overlap_table

    if (model is None) != (tasks is None):
        raise InputError("circuits are run on tasks with --model and --tasks; give both")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise InputError("--tasks names no task; name at least one")
    for name in names:
        check_source(*_source(name))
    a, b = Circuit.load(first), Circuit.load(second)
    found = overlap(a, b)
    rows: list[dict[str, Any]] = []
    if model is not None:
        masked = load_model(model, device, dtype, EmbeddingNodes(a.graph.embedding_nodes))
        check_circuit(first, a, model, masked)
        check_circuit(second, b, model, masked)
        pairs = {name: load_task(model, masked, *_source(name), seed) for name in names}
        same = first.name == second.name
        circuits = dict(zip(([str(first), str(second)] if same else [first.name, second.name]), (a, b), strict=True))
        with watch(stderr) as watcher:
            rows = cross_evaluate(
                masked,
                circuits,
                pairs,
                split,
                on_cell=lambda done, most: watcher.on_progress("compare", done, most),
                on_note=watcher.on_note,
            )
    for path, both in ((intersection, a & b), (union, a | b)):
        if path is not None:
            both.save(path)
    if as_json:
        print_json({**found, **({"tasks": rows} if rows else {})})
    else:
        stdout.print(overlap_table(found, first.name, second.name), *([cross_table(rows)] if rows else []))


def _source(name: str) -> tuple[str | None, Path | None]:
    """A task by name, or a file of pairs."""
    return (None, Path(name)) if Path(name).suffix else (name, None)

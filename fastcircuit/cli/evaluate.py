"""``fastcircuit evaluate``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.analyses import Analyses
from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import (
    AsJson,
    DataFile,
    Device,
    Dtype,
    EmbeddingNodes,
    InDtype,
    Model,
    OnDevice,
    Seed,
    TaskName,
)
from fastcircuit.cli.sources import check_circuit, check_source, load_model, load_task


def evaluate(
    model: Model,
    circuit: Annotated[Path, typer.Argument(help="circuit.json, or another tool's (see `convert`).")],
    task: TaskName = None,
    data: DataFile = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    metrics: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas. Default: all that the task has.", show_default=False),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(help="Resamples for an interval around every mean; 0: no intervals.", min=0)
    ] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = 0.95,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="A discovery's masks.safetensors, or a scored circuit of another tool: faithfulness at every size, "
            "CPR and CMD.",
            show_default=False,
        ),
    ] = None,
    signed: Annotated[bool, typer.Option("--signed", help="Rank --scores by value, not by size.")] = False,
    completeness: Annotated[
        int | None, typer.Option(help="Remove so many random parts from circuit and model, and compare.", min=1)
    ] = None,
    edge_faithfulness: Annotated[
        Path | None,
        typer.Option(help="Remove every edge alone, from circuit and model; write this .csv and a plot beside it."),
    ] = None,
    most_examples: Annotated[
        int | None, typer.Option(help="Examples for --edge-faithfulness. Default: all.", min=1, show_default=False)
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="Known circuit to compare with: a file, or a manual circuit by name.")
    ] = None,
    embedding_nodes: Annotated[
        EmbeddingNodes | None, typer.Option(help="Of an edges.json; a circuit.json says so itself.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """How faithful a circuit is: KL, accuracy, logit and probability difference, exact match, rank correlation."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.evaluation.faithfulness import evaluate as measure
    from fastcircuit.evaluation.registry import check_names
    from fastcircuit.evaluation.size import sizes
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import analysis_tables, metrics_table

    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    check_names(names)
    analyses = Analyses(
        completeness, edge_faithfulness, most_examples, scores, signed, truth, bootstrap, confidence, seed
    )
    analyses.check()
    loaded = None if embedding_nodes else Circuit.load(circuit)
    if loaded and task is None and data is None:
        task = loaded.task
    check_source(task, data)
    nodes = embedding_nodes or EmbeddingNodes(loaded.graph.embedding_nodes if loaded else "split")
    masked = load_model(model, device, dtype, nodes)
    kept = loaded or Circuit.load(circuit, masked.graph)
    check_circuit(circuit, kept, model, masked)
    pairs = load_task(model, masked, task, data, seed)
    with watch(stderr) as watcher:
        found = measure(masked, kept, pairs, split, names, bootstrap, confidence, seed, watcher.on_note)
        more = analyses.run(masked, kept, pairs, split, watcher)
    if as_json:
        print_json({**sizes(kept), split: found, **more})
    else:
        stdout.print(metrics_table(dataclasses.replace(kept, metrics={split: found})), *analysis_tables(more))

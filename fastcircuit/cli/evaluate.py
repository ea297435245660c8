"""``fastcircuit evaluate``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stdout
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
from fastcircuit.cli.sources import check_source, load_model, load_task


def evaluate(
    model: Model,
    circuit: Annotated[Path, typer.Argument(help="circuit.json, or another tool's (see `convert`).")],
    task: TaskName = None,
    data: DataFile = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    embedding_nodes: Annotated[
        EmbeddingNodes | None, typer.Option(help="Of an edges.json; a circuit.json says so itself.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """How faithful a circuit is: KL, accuracy, logit difference, exact match."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.evaluation.faithfulness import evaluate as measure
    from fastcircuit.report.tables import metrics_table

    loaded = None if embedding_nodes else Circuit.load(circuit)
    if loaded and task is None and data is None:
        task = loaded.task
    check_source(task, data)
    nodes = embedding_nodes or EmbeddingNodes(loaded.graph.embedding_nodes if loaded else "split")
    masked = load_model(model, device, dtype, nodes)
    kept = loaded or Circuit.load(circuit, masked.graph)
    pairs = load_task(model, masked, task, data, seed)
    metrics = measure(masked, kept, pairs, split)
    if as_json:
        print_json(
            {"edges": kept.num_edges, "total_edges": kept.graph.num_edges, "sparsity": kept.sparsity, split: metrics}
        )
    else:
        stdout.print(metrics_table(dataclasses.replace(kept, metrics={split: metrics})))

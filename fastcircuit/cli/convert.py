"""``fastcircuit convert``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stdout
from fastcircuit.cli.options import AsJson, EmbeddingNodes


def convert(
    circuit: Annotated[Path, typer.Argument(help="A circuit of this or another tool, .json or .json.gz.")],
    out: Annotated[Path, typer.Argument(help="File to write; .gz is compressed.")],
    to: Annotated[
        str, typer.Option(help="Format to write: fastcircuit, edge-pruning, eap-ig or acdc.")
    ] = "fastcircuit",
    edges: Annotated[int | None, typer.Option(help="Keep so many edges with the largest scores instead.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the circuit, for a file that does not say so (only its config is read)."),
    ] = None,
    embedding_nodes: Annotated[
        EmbeddingNodes | None,
        typer.Option(help="Count embeddings so. Default: as the file does; with --model split.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a circuit for another tool: Edge Pruning, EAP-IG and the MIB track, ACDC."""
    from fastcircuit.formats import read, to_graph, write
    from fastcircuit.models.loading import load_graph

    graph = load_graph(model, embedding_nodes.value if embedding_nodes else "split") if model else None
    file = read(circuit, graph)
    if edges is not None:
        file = dataclasses.replace(file, circuit=file.top(edges))
    if embedding_nodes and file.graph.embedding_nodes != embedding_nodes.value:
        wanted = dataclasses.replace(file.graph, embedding_nodes=embedding_nodes.value)
        file = type(file)(file.format, to_graph(file.circuit, wanted))
    write(out, file, to)
    kept = file.circuit
    if as_json:
        print_json({"edges": kept.num_edges, "total_edges": kept.graph.num_edges, "format": to, "files": [str(out)]})
    else:
        stdout.print(f"wrote {out}: {kept}", soft_wrap=True)

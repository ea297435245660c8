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
    no_scores: Annotated[bool, typer.Option("--no-scores", help="Leave scores out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite a circuit for another tool: Edge Pruning, EAP-IG and the MIB track, ACDC.

    Scores go along from EAP-IG's files into masks.safetensors beside a circuit.json, and back.
    """
    from fastcircuit.formats import read, to_graph, write
    from fastcircuit.graph import Graph
    from fastcircuit.models.loading import load_config

    config = load_config(model) if model else None
    graph = Graph.from_config(config, embedding_nodes.value if embedding_nodes else "split") if config else None
    file = read(circuit, graph, scores=not no_scores)
    if edges is not None:
        file = dataclasses.replace(file, circuit=file.top(edges))
    if embedding_nodes and file.graph.embedding_nodes != embedding_nodes.value:
        wanted = dataclasses.replace(file.graph, embedding_nodes=embedding_nodes.value)
        file = type(file)(file.format, to_graph(file.circuit, wanted))
    if no_scores:
        file = dataclasses.replace(file, edge_scores=None, node_scores=None)
    if config is not None:
        about = {"architecture": config.model_type, **file.circuit.model}
        file = dataclasses.replace(file, circuit=dataclasses.replace(file.circuit, model=about))
    kept, files = file.circuit, [str(path) for path in write(out, file, to)]
    scored = file.edge_scores is not None and to in ("fastcircuit", "eap-ig")
    if as_json:
        sizes = {"edges": kept.num_edges, "total_edges": kept.graph.num_edges}
        print_json({**sizes, "format": to, "scores": scored, "files": files})
    else:
        stdout.print(f"wrote {', '.join(files)}: {kept}{', with scores' if scored else ''}", soft_wrap=True)

"""Circuits in the files of other tools.

    file = read("gpt2_ioi_eap-ig.json.gz")     # told by what is in it
    file.top(500).save("circuit.json")         # the 500 edges with the largest scores
    write("edges.json", circuit, "edge-pruning")

One file here per tool; ``conventions.py`` takes a circuit from one way to count embeddings and heads to another. Scores
of a ``circuit.json`` lie beside it (``score_file.py``).
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcircuit.circuit import FORMAT, Circuit
from fastcircuit.errors import InputError
from fastcircuit.files import read_json, write_json
from fastcircuit.formats import acdc, eap_ig, edge_pruning, score_file
from fastcircuit.formats.circuit_file import CircuitFile
from fastcircuit.formats.conventions import to_graph
from fastcircuit.graph import Graph

__all__ = ["FORMATS", "CircuitFile", "parse", "read", "to_graph", "write"]

FORMATS = ("fastcircuit", "edge-pruning", "eap-ig", "acdc")
_TOOLS = {"acdc": acdc, "edge-pruning": edge_pruning, "eap-ig": eap_ig}  # in the order in which they are recognised


def read(path: str | os.PathLike[str], graph: Graph | None = None, scores: bool = True) -> CircuitFile:
    """The circuit in a file, plain or ``.gz``, and what else the file holds.

    Scores of a ``circuit.json`` are those of the safetensors file beside it, if there is one.

    Args:
        graph: the model's; the circuit is taken to it (see :func:`to_graph`). Edge lists need it, since they do not say
            what they are of. None: the graph the file names, as the tool counts it.
        scores: False: do not look beside a ``circuit.json``.

    Raises:
        InputError: no such file, none of :data:`FORMATS`, or a circuit that does not fit ``graph``.
    """
    value = read_json(path, "circuit")
    try:
        file = parse(value, graph)
    except InputError as error:
        raise InputError(f"circuit file {path}: {error}") from None
    beside = score_file.beside(path)
    if not scores or file.format != "fastcircuit" or Graph(**value["graph"]) != file.graph or not beside.exists():
        return file
    return _scored(file, beside)


def _scored(file: CircuitFile, path: Path) -> CircuitFile:
    """``file`` with the scores in ``path``; InputError when they are of another graph."""
    found, graph = score_file.load(path), file.graph
    for name, values, size in (("edge", found.edge, graph.num_edges), ("node", found.node, graph.num_writers)):
        if values is not None and values.shape != (size,):
            raise InputError(
                f"scores file {path} has {name} scores of shape {values.shape}, and the circuit beside it is over "
                f"{graph}, which needs ({size},); it is of another circuit, move it away"
            )
    return replace(file, edge_scores=found.edge, node_scores=found.node, log_alpha=found.log_alpha)


def parse(value: Any, graph: Graph | None = None) -> CircuitFile:
    """The circuit in the JSON value of a file (see :func:`read`)."""
    if isinstance(value, dict) and value.get("format") == FORMAT:
        circuit = Circuit.from_dict(value)
        return CircuitFile("fastcircuit", circuit if graph is None else to_graph(circuit, graph))
    for name, tool in _TOOLS.items():
        if tool.recognises(value):
            file = tool.parse(value, graph)
            assert file.format == name
            return file
    found = repr(value["format"]) if isinstance(value, dict) and "format" in value else type(value).__name__
    raise InputError(
        f'it is no known circuit (found {found}); accepted: fastcircuit ("format": "{FORMAT}"), edge-pruning '
        "([[writer, reader], ...]), eap-ig (cfg, edges, and nodes or in_graph), acdc ([[receiver, index, sender, "
        'index], ...] or {"original": ...})'
    )


def write(path: str | os.PathLike[str], circuit: Circuit | CircuitFile, format: str) -> list[Path]:
    """Write a circuit as one of :data:`FORMATS`; what was read as this format is written as it was.

    A path that ends in ``.gz`` is compressed. Scores are written into an ``eap-ig`` file, and beside a ``fastcircuit``
    one (see :func:`fastcircuit.formats.score_file.beside`); the other formats hold none.

    Returns:
        What was written.

    Raises:
        InputError: no such format, a circuit or scores that the format cannot express, or a circuit without scores
            that would lie beside those of another one.
    """
    if format not in FORMATS:
        raise InputError(f"no circuit format {format!r}; formats: {', '.join(FORMATS)}")
    file = circuit if isinstance(circuit, CircuitFile) else CircuitFile("fastcircuit", circuit)
    if file.format != format:
        file = replace(file, about={})
    value = file.circuit.to_dict() if format == "fastcircuit" else _TOOLS[format].dump(file)
    written = _write_scores(score_file.beside(path), file) if format == "fastcircuit" else []
    write_json(Path(path), value, compact=format == "eap-ig")
    return [Path(path), *written]


def _write_scores(path: Path, file: CircuitFile) -> list[Path]:
    if file.edge_scores is not None:
        score_file.save(path, score_file.ScoreFile(file.edge_scores, file.node_scores, file.log_alpha))
        return [path]
    if path.exists():
        raise InputError(
            f"{path} holds scores of another circuit, and this one has none; move it away, or choose a name"
        )
    return []

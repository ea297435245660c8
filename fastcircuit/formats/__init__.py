"""Circuits in the files of other tools.

    file = read("gpt2_ioi_eap-ig.json.gz")     # told by what is in it
    file.top(500).save("circuit.json")         # the 500 edges with the largest scores
    write("edges.json", circuit, "edge-pruning")

One file here per tool; ``conventions.py`` takes a circuit from one way to count embeddings and heads to another.
"""

import os
from pathlib import Path
from typing import Any

from fastcircuit.circuit import FORMAT, Circuit
from fastcircuit.errors import InputError
from fastcircuit.files import read_json, write_json
from fastcircuit.formats import acdc, eap_ig, edge_pruning
from fastcircuit.formats.circuit_file import CircuitFile
from fastcircuit.formats.conventions import to_graph
from fastcircuit.graph import Graph

__all__ = ["FORMATS", "CircuitFile", "parse", "read", "to_graph", "write"]

FORMATS = ("fastcircuit", "edge-pruning", "eap-ig", "acdc")
_TOOLS = {"acdc": acdc, "edge-pruning": edge_pruning, "eap-ig": eap_ig}  # in the order in which they are recognised


def read(path: str | os.PathLike[str], graph: Graph | None = None) -> CircuitFile:
    """The circuit in a file, plain or ``.gz``, and what else the file holds.

    Args:
        graph: the model's; the circuit is taken to it (see :func:`to_graph`). Edge lists need it, since they do not say
            what they are of. None: the graph the file names, as the tool counts it.

    Raises:
        InputError: no such file, none of :data:`FORMATS`, or a circuit that does not fit ``graph``.
    """
    value = read_json(path, "circuit")
    try:
        return parse(value, graph)
    except InputError as error:
        raise InputError(f"circuit file {path}: {error}") from None


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


def write(path: str | os.PathLike[str], circuit: Circuit | CircuitFile, format: str) -> None:
    """Write a circuit as one of :data:`FORMATS`; what was read as this format is written as it was.

    A path that ends in ``.gz`` is compressed. ``fastcircuit`` and ``edge-pruning`` hold no scores.

    Raises:
        InputError: no such format, or a circuit that the format cannot express.
    """
    if format not in FORMATS:
        raise InputError(f"no circuit format {format!r}; formats: {', '.join(FORMATS)}")
    file = circuit if isinstance(circuit, CircuitFile) else CircuitFile("fastcircuit", circuit)
    value = file.circuit.to_dict() if format == "fastcircuit" else _TOOLS[format].dump(file)
    write_json(Path(path), value, compact=format == "eap-ig")

"""``draw(circuit, path)``: a circuit as a picture, by the suffix of ``path``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.files import write_atomically, write_text
from fastcircuit.report.layout import Layout, layout
from fastcircuit.report.page import page
from fastcircuit.report.scene import Scene, scene
from fastcircuit.report.svg import svg

MOST_EDGES = 100_000  # a drawing of more is a grey block that takes minutes and hundreds of megabytes


def draw(circuit: Circuit, path: str | os.PathLike[str], weights: Any = None) -> None:
    """Draw ``circuit`` into ``path``.

    Layers are rows, embeddings at the bottom, the output on top; every kept edge is one curve, coloured by the type of
    its reader (query, key, value, MLP, output). Key and value edges of grouped-query attention land on a key/value
    node that stands in one outline with the heads it feeds (see :mod:`.components`).

    Args:
        circuit: what to draw. Components that no edge touches are left out; call ``circuit.pruned()`` first to leave
            out edges that cannot matter, too.
        path: ``.svg`` (vector, for papers), ``.png`` (needs no browser or graphviz) or ``.html`` (one interactive page
            that needs no network).
        weights: one number per edge of ``circuit.graph`` (array or tensor), for instance attribution scores or mask
            values; larger in magnitude is drawn thicker.

    Raises:
        InputError: another suffix, more than 100,000 edges, or weights of another length.
        RunError: the file cannot be written.
    """
    writer = _WRITERS.get(Path(path).suffix.lower())
    if writer is None:
        raise InputError(f"cannot draw {path}: its suffix is not one of {', '.join(_WRITERS)}")
    if circuit.num_edges > MOST_EDGES:
        raise InputError(
            f"a circuit of {circuit.num_edges:,} edges cannot be drawn (at most {MOST_EDGES:,}); draw a sparser one"
        )
    placed = layout(circuit, _per_edge(circuit, weights))
    writer(circuit, placed, scene(circuit, placed), path)


def _per_edge(circuit: Circuit, weights: Any) -> np.ndarray | None:
    if weights is None:
        return None
    if hasattr(weights, "detach"):  # a torch tensor, perhaps on a device, perhaps in bfloat16, which numpy lacks
        weights = weights.detach().double().cpu().numpy()
    values = np.asarray(weights, dtype=float)
    if values.shape != (circuit.graph.num_edges,):
        raise InputError(
            f"weights for this circuit's graph need shape ({circuit.graph.num_edges},), got {values.shape}"
        )
    return values


def _svg(circuit: Circuit, placed: Layout, dressed: Scene, path: str | os.PathLike[str]) -> None:
    write_text(path, svg(dressed))


def _png(circuit: Circuit, placed: Layout, dressed: Scene, path: str | os.PathLike[str]) -> None:
    from fastcircuit.report.png import write_png  # matplotlib takes half a second to import

    write_atomically(path, lambda temporary: write_png(dressed, temporary))


def _html(circuit: Circuit, placed: Layout, dressed: Scene, path: str | os.PathLike[str]) -> None:
    write_text(path, page(circuit, placed, dressed))


_WRITERS: dict[str, Callable[[Circuit, Layout, Scene, str | os.PathLike[str]], None]] = {
    ".svg": _svg,
    ".png": _png,
    ".html": _html,
}

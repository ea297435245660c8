"""From a circuit to node positions and edge curves: layers as rows, embeddings at the bottom, the output on top.

Pure geometry in pixels, y downwards; :mod:`.scene` dresses it. Within a layer the MLP stands above the attention
heads, because the heads feed it: so every edge runs upwards.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.report import routing
from fastcircuit.report.components import READER_KINDS, Component, NodeKind, ReaderKind, drawn, reader_kinds
from fastcircuit.report.placement import Links, place
from fastcircuit.report.routing import SPARSE

NODE_HEIGHT = {"head": 34.0, "kv": 34.0, "mlp": 26.0, "embedding": 26.0, "output": 26.0}
LABEL_ADVANCE = 7.2  # px per character of a node label; generous, so that any sans-serif font fits
GAPS = 20.0, 90.0  # least and most between boxes of a row
SPARSE_GAPS = 40.0, 120.0  # the same where every line should find its own way
MEMBER_GAP = 6.0  # between the nodes of one key/value group
GUTTER, SIDE = 92.0, 56.0  # left of the boxes (layer names), and free for detours on both sides
LEAST_WIDTH = 400.0
SLENDER = 0.5  # a row may spread until the drawing is this wide for its height
BAND_PAD, THIN_BAND = 13.0, 20.0  # inside a layer's band; height of a layer with no node


@dataclass(frozen=True)
class Node:
    """A drawn component: centre, size, and the x of each reader type that a kept edge reaches (``ports``)."""

    name: str
    kind: NodeKind
    layer: int
    x: float
    y: float
    width: float
    height: float
    group: int
    touched: bool
    readers: tuple[str, ...]
    ports: tuple[tuple[ReaderKind, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom."""
        return self.x - self.width / 2, self.y - self.height / 2, self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Band:
    """The strip of one layer (or of the embeddings, or the output) across the drawing."""

    layer: int
    label: str
    top: float
    bottom: float


@dataclass(frozen=True)
class Edges:
    """The kept edges in canonical order, one entry each: graph edge, end nodes, reader, type, weight, curve."""

    ids: np.ndarray
    writer: np.ndarray
    reader: np.ndarray
    reader_id: np.ndarray
    kind: np.ndarray  # index into READER_KINDS
    weight: np.ndarray | None
    curves: np.ndarray  # [num_edges, 4, 2]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Layout:
    """Everything a renderer needs to know about where things are."""

    nodes: tuple[Node, ...]
    bands: tuple[Band, ...]
    groups: tuple[tuple[int, ...], ...]  # nodes that share a key/value head: drawn inside one outline
    edges: Edges
    width: float
    height: float


def layout(circuit: Circuit, weights: np.ndarray | None = None) -> Layout:
    """Place the nodes of ``circuit`` and route its edges. ``weights`` ``[graph.num_edges]`` ride along."""
    found, alive = drawn(circuit)
    shelf = _Shelf(circuit, found)
    tops, bands, height = _rows(circuit, shelf)
    x = _centres(shelf, max(LEAST_WIDTH, SLENDER * height))
    graph = circuit.graph
    reach = [x[index] + side * shelf.widths[index] / 2 for index in range(len(found)) for side in (-1, 1)]
    width = GUTTER + max(LEAST_WIDTH, max(reach) - min(reach) + 2 * SIDE)
    x = x + (GUTTER + width - max(reach) - min(reach)) / 2
    nodes = tuple(
        Node(
            item.name,
            item.kind,
            item.layer,
            float(x[index]),
            tops[item.row] + NODE_HEIGHT[item.kind] / 2,
            shelf.widths[index],
            NODE_HEIGHT[item.kind],
            item.group,
            bool(alive[index]),
            tuple(graph.readers[reader] for reader in item.readers),
            tuple((kind, float(x[index]) + at) for kind, at in shelf.used_ports(index)),
        )
        for index, item in enumerate(found)
    )
    groups = tuple(
        tuple(unit) for unit in shelf.units if graph.num_kv_heads < graph.num_heads and _is_group(found, unit)
    )
    return Layout(nodes, bands, groups, _routed(shelf, nodes, weights, width, height), width, height)


def _is_group(found: list[Component], unit: list[int]) -> bool:
    return found[unit[0]].kind in ("kv", "head")


class _Shelf:
    """The drawn components sorted into units (what moves as one block) and rows, and the ends of every edge."""

    def __init__(self, circuit: Circuit, found: list[Component]) -> None:
        graph = circuit.graph
        self.found = found
        self.ids = np.flatnonzero(circuit.keep)
        self.reader_id = graph.edge_readers[self.ids]
        kinds = reader_kinds(graph)
        self.kind_of_reader = np.array([READER_KINDS.index(kind) for kind in kinds])
        self.kind = self.kind_of_reader[self.reader_id]
        node_of_writer, node_of_reader = np.zeros(graph.num_writers, int), np.zeros(graph.num_readers, int)
        for index, item in enumerate(found):
            if item.writer is not None:
                node_of_writer[item.writer] = index
            node_of_reader[list(item.readers)] = index
        self.writer = node_of_writer[graph.edge_writers[self.ids]]
        self.reader = node_of_reader[self.reader_id]
        self.widths = [
            max(46.0 if item.kind == "head" else 40.0, LABEL_ADVANCE * len(item.name) + 14) for item in found
        ]
        self.units = [
            [index for index, _ in members]
            for _, members in groupby(enumerate(found), key=lambda pair: _unit_key(pair[1]))
        ]
        self._reached = set(zip(self.reader.tolist(), self.kind.tolist(), strict=True))

    def port(self, node: int, kind: ReaderKind) -> float:
        """Where an edge of this type lands, relative to the node's centre: q, k, v from left to right."""
        landing = [READER_KINDS[self.kind_of_reader[reader]] for reader in self.found[node].readers]
        step = self.widths[node] / (len(landing) + 1)
        return step * (landing.index(kind) + 1) - self.widths[node] / 2

    def used_ports(self, node: int) -> list[tuple[ReaderKind, float]]:
        return [(kind, self.port(node, kind)) for i, kind in enumerate(READER_KINDS) if (node, i) in self._reached]

    def landings(self) -> np.ndarray:
        """Port offset of every edge."""
        table = {(node, kind): self.port(node, READER_KINDS[kind]) for node, kind in self._reached}
        return np.array(
            [table[pair] for pair in zip(self.reader.tolist(), self.kind.tolist(), strict=True)], dtype=float
        )


def _unit_key(item: Component) -> tuple[object, ...]:
    return (item.layer, item.group) if item.kind in ("head", "kv") else (item.name,)


def _centres(shelf: _Shelf, room: float) -> np.ndarray:
    """Centre x of every node; rows spread into ``room`` px if they can."""
    widths, unit_of, offset = [], np.zeros(len(shelf.found), int), np.zeros(len(shelf.found))
    for number, unit in enumerate(shelf.units):
        total = sum(shelf.widths[node] for node in unit) + MEMBER_GAP * (len(unit) - 1)
        left = -total / 2
        for node in unit:
            unit_of[node], offset[node] = number, left + shelf.widths[node] / 2
            left += shelf.widths[node] + MEMBER_GAP
        widths.append(total)
    rows: dict[tuple[int, int], list[int]] = {}
    for number, unit in enumerate(shelf.units):
        rows.setdefault(shelf.found[unit[0]].row, []).append(number)
    links = Links(
        unit_of[shelf.writer], unit_of[shelf.reader], offset[shelf.writer], offset[shelf.reader] + shelf.landings()
    )
    ordered = [rows[key] for key in sorted(rows)]
    return (
        place(ordered, np.array(widths), links, room, SPARSE_GAPS if len(shelf.ids) <= SPARSE else GAPS)[unit_of]
        + offset
    )


def _rows(circuit: Circuit, shelf: _Shelf) -> tuple[dict[tuple[int, int], float], tuple[Band, ...], float]:
    """Top of every row, the bands, and the height of the drawing. Denser circuits get more room between layers."""
    present = {item.row: NODE_HEIGHT[item.kind] for item in shelf.found}
    between = 28.0 + 8.0 * min(2.0, len(shelf.ids) / 200)
    tops: dict[tuple[int, int], float] = {}
    bands, y = [], 0.0
    lowest = 0 if circuit.graph.embedding_nodes == "none" else -1
    for layer in range(circuit.graph.num_layers, lowest - 1, -1):
        rows = [row for row in ((layer, 1), (layer, 0)) if row in present]
        top = y
        y += BAND_PAD if rows else THIN_BAND
        for row in rows:
            tops[row] = y
            y += present[row] + BAND_PAD * (2 if row != rows[-1] else 1)
        bands.append(Band(layer, _band_label(layer, circuit.graph.num_layers), top, y))
        y += between if rows else between / 3
    return tops, tuple(bands), bands[-1].bottom


def _band_label(layer: int, num_layers: int) -> str:
    return {-1: "embeddings", num_layers: "output"}.get(layer, f"layer {layer}")


def _routed(shelf: _Shelf, nodes: tuple[Node, ...], weights: np.ndarray | None, width: float, height: float) -> Edges:
    boxes = np.array([node.box for node in nodes])
    x = np.array([node.x for node in nodes])
    starts = np.stack([x[shelf.writer], boxes[shelf.writer, 1]], axis=1)
    ends = np.stack([x[shelf.reader] + shelf.landings(), boxes[shelf.reader, 3]], axis=1)
    own = np.stack([shelf.writer, shelf.reader], axis=1)
    clear = np.array([GUTTER, 0.0])  # detours may not run through the layer names
    shifted = boxes - np.tile(clear, 2)
    points = (
        routing.curves(starts - clear, ends - clear, own, routing.Obstacles(shifted, width - GUTTER, height)) + clear
    )
    weight = None if weights is None else np.asarray(weights, dtype=float)[shelf.ids]
    return Edges(shelf.ids, shelf.writer, shelf.reader, shelf.reader_id, shelf.kind, weight, points)

"""A layout dressed as boxes, texts and lines with style names: what the SVG, PNG and HTML renderers all draw."""

from dataclasses import dataclass

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.report import caption
from fastcircuit.report.components import READER_KINDS, ReaderKind
from fastcircuit.report.layout import Layout, Node
from fastcircuit.report.style import READER_LABELS, TEXTS, edge_style

MARGIN = 16.0
LEADING = 1.45  # line height over font size
BOX_STYLES = {"mlp": "mlp-node", "output": "output-node"}  # others are called as the node's kind
WEAKEST, STRONGEST = 0.35, 2.2  # line width factors of the least and the most important edge


@dataclass(frozen=True)
class Box:
    """A rounded rectangle; ``style`` names an entry of :data:`.style.BOXES`."""

    x: float
    y: float
    width: float
    height: float
    style: str


@dataclass(frozen=True)
class Text:
    """One line of text, ``x, y`` on its baseline; ``style`` names an entry of :data:`.style.TEXTS`."""

    x: float
    y: float
    text: str
    style: str
    anchor: str = "start"


@dataclass(frozen=True)
class Stroke:
    """A horizontal legend sample in the colour of a reader type."""

    x: float
    y: float
    length: float
    kind: ReaderKind


@dataclass(frozen=True)
class Scene:
    """Everything drawn, back to front: ``back``, the curves, ``nodes`` (parts of one node together), ``front``.

    ``top`` is the height of the caption above the drawing proper, whose own coordinates the layout fixed.
    """

    width: float
    height: float
    top: float
    title: str
    description: str
    back: list[Box | Text]
    nodes: list[list[Box | Text]]
    front: list[Text | Stroke]
    curves: np.ndarray
    kinds: np.ndarray
    widths: np.ndarray
    opacity: float
    names: list[str]


def scene(circuit: Circuit, placed: Layout) -> Scene:
    """Dress ``placed``, the layout of ``circuit``."""
    lines = [(caption.title(circuit), "title"), *((line, "caption") for line in caption.caption(circuit))]
    lines += [(line, "notice") for line in caption.notices(circuit)]
    width = placed.width + 2 * MARGIN
    header, top = _header(lines, placed.width)
    legend, bottom = _legend(placed)
    width_of_line, opacity = edge_style(len(placed.edges))
    return Scene(
        width=width,
        height=top + bottom + MARGIN,
        top=top,
        title=caption.title(circuit),
        description=". ".join([*(text for text, _ in lines[1:]), reading_note(placed)]),
        back=_bands(placed) + _outlines(placed),
        nodes=[_node(node) for node in placed.nodes],
        front=[*header, *legend],
        curves=placed.edges.curves,
        kinds=placed.edges.kind,
        widths=width_of_line * _emphasis(placed.edges.weight, len(placed.edges)),
        opacity=opacity,
        names=[f"{writer} → {reader}" for writer, reader in circuit.edges],
    )


def _header(lines: list[tuple[str, str]], width: float) -> tuple[list[Text | Stroke], float]:
    """Caption lines above the drawing (negative y) and the height they take."""
    rows = [(part, style) for text, style in lines for part in caption.wrapped(text, width, TEXTS[style].size)]
    total = sum(TEXTS[style].size * LEADING for _, style in rows) + MARGIN + 8
    placed: list[Text | Stroke] = []
    y = MARGIN - total
    for text, style in rows:
        y += TEXTS[style].size * LEADING
        placed.append(Text(0.0, y - 0.3 * TEXTS[style].size, text, style))
    return placed, total


def _bands(placed: Layout) -> list[Box | Text]:
    items: list[Box | Text] = []
    for band in placed.bands:
        middle = (band.top + band.bottom) / 2
        items.append(Box(0.0, band.top, placed.width, band.bottom - band.top, "band"))
        items.append(Text(10.0, middle + 4, band.label, "band-label"))
    return items


def _outlines(placed: Layout) -> list[Box | Text]:
    """The outline around a key/value node and the heads that share it."""
    pad = 5.0
    items: list[Box | Text] = []
    for group in placed.groups:
        boxes = np.array([placed.nodes[member].box for member in group])
        left, top = boxes[:, :2].min(axis=0) - pad
        right, bottom = boxes[:, 2:].max(axis=0) + pad
        items.append(Box(float(left), float(top), float(right - left), float(bottom - top), "group"))
    return items


def _node(node: Node) -> list[Box | Text]:
    """Box, name, and a letter where q, k or v edges land."""
    left, top, _, bottom = node.box
    letters = [(kind, x) for kind, x in node.ports if kind in ("q", "k", "v")]
    baseline = top + 14 if letters else node.y + 4
    style = BOX_STYLES.get(node.kind, node.kind) if node.touched else "idle"
    return [
        Box(left, top, node.width, node.height, style),
        Text(node.x, baseline, node.name, "label" if node.touched else "idle-label", "middle"),
        *(Text(x, bottom - 5, kind, f"port-{kind}", "middle") for kind, x in letters),
    ]


def _legend(placed: Layout) -> tuple[list[Text | Stroke], float]:
    """A sample of every reader type's colour, how to read the drawing, and where that ends."""
    y = placed.height + MARGIN + 10
    items: list[Text | Stroke] = [Text(0.0, y + 4, "Edge into", "band-label")]
    x = 62.0
    for kind in READER_KINDS:
        label = READER_LABELS[kind]
        items += [Stroke(x, y, 20.0, kind), Text(x + 25, y + 4, label, "legend")]
        x += 25 + 6.6 * len(label) + 14
    for line in caption.wrapped(reading_note(placed), placed.width, TEXTS["band-label"].size):
        y += TEXTS["band-label"].size * LEADING + 2
        items.append(Text(0.0, y + 6, line, "band-label"))
    return items, y + 10


def reading_note(placed: Layout) -> str:
    """How to read this drawing, in a sentence or three."""
    note = "Edges run upwards, from writer to reader."
    if placed.groups:
        note += " An outline holds a key/value head (kv) and the query heads that share its keys and values."
    if placed.edges.weight is not None:
        note += " Thicker means a larger weight."
    return note


def _emphasis(weights: np.ndarray | None, count: int) -> np.ndarray:
    """Line width factors: 1 without weights, else growing with the size of the weight."""
    size = np.nan_to_num(np.abs(weights)) if weights is not None else np.zeros(count)
    if not size.max(initial=0.0):
        return np.ones(count)
    return WEAKEST + (STRONGEST - WEAKEST) * size / size.max()

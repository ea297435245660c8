"""The interactive page: one HTML file with the drawing, its data, its style and its script, and no network.

The browser draws the edges from JSON, so that a circuit with more edges than a browser can restyle on every pointer
move stays usable: above :data:`MOST_DRAWN` only the edges of the node pointed at are drawn, and the page says so.
"""

import html
import json
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.report import caption
from fastcircuit.report.components import READER_KINDS, ReaderKind
from fastcircuit.report.layout import Layout, Node
from fastcircuit.report.scene import Scene, reading_note
from fastcircuit.report.style import DARK, LIGHT, OPACITY, READER_LABELS, css
from fastcircuit.report.svg import body

MOST_DRAWN = 4000  # SVG paths that a browser dims and lights without a visible delay
ABOUT = {
    "embedding": "embedding",
    "head": "attention head",
    "kv": "key/value head",
    "mlp": "MLP",
    "output": "final read, before the unembedding",
}


def page(circuit: Circuit, placed: Layout, dressed: Scene) -> str:
    """The page for ``circuit`` as text; ``placed`` is its layout and ``dressed`` that layout's scene."""
    fill = {
        "title": html.escape(dressed.title),
        "style": _style(),
        "caption": _caption(circuit),
        "types": "".join(_type_box(kind) for kind in READER_KINDS),
        "layers": _layer_options(placed),
        "width": f"{placed.width:g}",
        "height": f"{placed.height:g}",
        "drawing": body(dressed),
        "data": _script_safe(_data(circuit, placed, dressed)),
        "script": _asset("page.js"),
    }
    return Template(_asset("page.html")).substitute(fill)


def _asset(name: str) -> str:
    return resources.files("fastcircuit.report").joinpath(name).read_text(encoding="utf-8")


def _script_safe(value: Any) -> str:
    """JSON that no HTML parser can mistake for the end of the script it stands in, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _style() -> str:
    rules = [
        css(LIGHT),
        _swatches(LIGHT),
        f"@media (prefers-color-scheme: dark) {{\n{css(DARK)}\n{_swatches(DARK)}\n}}",
    ]
    return "\n".join([*rules, _asset("page.css")])


def _swatches(palette: dict[str, str]) -> str:
    return "\n".join(f".type-{kind} {{ background: {palette[kind]}; }}" for kind in READER_KINDS)


def _caption(circuit: Circuit) -> str:
    lines = [f"<p>{html.escape(line)}</p>" for line in caption.caption(circuit)]
    if not circuit.num_edges:
        lines += [f'<p class="notice">{html.escape(line)}</p>' for line in caption.notices(circuit)]
    return "\n".join(lines)


def _type_box(kind: ReaderKind) -> str:
    label = html.escape(READER_LABELS[kind])
    return (
        f'<label><input type="checkbox" value="{kind}" checked><span class="swatch type-{kind}"></span>{label}</label>'
    )


def _layer_options(placed: Layout) -> str:
    return "".join(
        f'<option value="{band.layer}">{html.escape(band.label.removeprefix("layer "))}</option>'
        for band in reversed(placed.bands)
    )


def _data(circuit: Circuit, placed: Layout, dressed: Scene) -> dict[str, Any]:
    """What the script needs: nodes, readers, and the edges as columns."""
    edges = placed.edges
    used, reader_row = np.unique(edges.reader_id, return_inverse=True)
    node_of = dict(zip(edges.reader_id.tolist(), edges.reader.tolist(), strict=True))
    kind_of = dict(zip(edges.reader_id.tolist(), edges.kind.tolist(), strict=True))
    names = circuit.graph.readers
    mates = {member: [other for other in group if other != member] for group in placed.groups for member in group}
    return {
        "nodes": [_node(node, mates.get(index, []), placed) for index, node in enumerate(placed.nodes)],
        "readers": [
            {"name": names[row], "node": node_of[row], "type": READER_KINDS[kind_of[row]]} for row in used.tolist()
        ],
        "edges": {
            "writer": edges.writer.tolist(),
            "reader": reader_row.tolist(),
            "curve": edges.curves.reshape(len(edges), 8).round(1).tolist(),
            "width": dressed.widths.round(2).tolist(),
            "weight": None if edges.weight is None else [f"{weight:.3g}" for weight in edges.weight],
        },
        "mostDrawn": MOST_DRAWN,
        "opacity": OPACITY,
        "note": reading_note(placed),
    }


def _node(node: Node, mates: list[int], placed: Layout) -> dict[str, Any]:
    about = ABOUT[node.kind]
    if node.kind in ("head", "kv", "mlp"):
        about += f" in layer {node.layer}"
    if node.kind == "kv" and mates:
        about += ", shared by " + ", ".join(placed.nodes[mate].name for mate in mates)
    return {
        "name": node.name,
        "kind": node.kind,
        "layer": node.layer,
        "about": about,
        "x": round(node.x, 1),
        "y": round(node.y, 1),
        "readers": list(node.readers),
        "mates": mates,
    }

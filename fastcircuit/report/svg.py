"""A scene as SVG text: plain elements and one style sheet, so that browsers, Inkscape and LaTeX tools agree."""

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from fastcircuit.report.components import READER_KINDS
from fastcircuit.report.scene import MARGIN, Box, Scene, Stroke, Text
from fastcircuit.report.style import BOXES, DENSE, LIGHT, css


def svg(scene: Scene) -> str:
    """The whole drawing as one SVG document."""
    size = f'width="{scene.width:g}" height="{scene.height:g}" viewBox="0 0 {scene.width:g} {scene.height:g}"'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(scene.title)}</title>',
            f'<desc id="desc">{escape(scene.description)}</desc>',
            f"<style>\n{css(LIGHT)}\n</style>",
            '<rect class="page" width="100%" height="100%"/>',
            f'<g transform="translate({MARGIN:g} {scene.top:g})">',
            *_elements(scene.back),
            f'<g class="edges" stroke-linecap="round" stroke-opacity="{scene.opacity:.3g}">',
            *_paths(scene),
            "</g>",
            *node_groups(scene),
            *_elements(scene.front),
            "</g>",
            "</svg>",
            "",
        ]
    )


def body(scene: Scene) -> str:
    """Bands and nodes without edges, caption or legend: what the HTML page draws its own edges into."""
    return "\n".join([*_elements(scene.back), '<g id="edges" stroke-linecap="round"></g>', *node_groups(scene)])


def node_groups(scene: Scene) -> list[str]:
    """One ``<g class="node" id="n0">`` per node, in layout order."""
    return [
        f'<g class="node" id="n{number}">{"".join(_elements(parts))}</g>' for number, parts in enumerate(scene.nodes)
    ]


def path_data(curve: np.ndarray) -> str:
    """The ``d`` of a cubic curve ``[4, 2]``."""
    start, *rest = (f"{x:.1f} {y:.1f}" for x, y in curve.tolist())
    return f"M{start}C{' '.join(rest)}"


def _paths(scene: Scene) -> list[str]:
    # A browser shows a path's title on hover; in a dense drawing nobody can point at one line and they double the file.
    titled = len(scene.curves) <= DENSE
    classes = [f"edge-{kind}" for kind in READER_KINDS]
    return [
        f'<path class="{classes[kind]}" stroke-width="{width:.3g}" d="{path_data(curve)}"'
        + (f"><title>{escape(name)}</title></path>" if titled else "/>")
        for curve, kind, width, name in zip(scene.curves, scene.kinds, scene.widths, scene.names, strict=True)
    ]


def _elements(items: Iterable[Box | Text | Stroke]) -> list[str]:
    return [_element(item) for item in items]


def _element(item: Box | Text | Stroke) -> str:
    if isinstance(item, Box):
        where = f'x="{item.x:.1f}" y="{item.y:.1f}" width="{item.width:.1f}" height="{item.height:.1f}"'
        return f'<rect class="{item.style}" {where} rx="{BOXES[item.style].radius:g}"/>'
    if isinstance(item, Stroke):
        line = f"M{item.x:.1f} {item.y:.1f}h{item.length:g}"
        return f'<path class="edge-{item.kind} legend-line" stroke-width="2.5" d="{line}"/>'
    anchor = "" if item.anchor == "start" else f" text-anchor={quoteattr(item.anchor)}"
    return f'<text class="{item.style}" x="{item.x:.1f}" y="{item.y:.1f}"{anchor}>{escape(item.text)}</text>'

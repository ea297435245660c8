"""A scene as a PNG, by matplotlib: needs no graphviz, no browser and no display."""

import warnings
from collections.abc import Iterable
from pathlib import Path as FilePath

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path
from matplotlib.text import Text as Label

from fastcircuit.report.components import READER_KINDS
from fastcircuit.report.scene import MARGIN, Box, Scene, Stroke, Text
from fastcircuit.report.style import BOXES, DENSE, LIGHT, TEXTS

SCALE = 2.0  # pixels per px of the layout: sharp at a paper's column width
DENSE_SCALE = 1.0  # of a dense drawing, which takes a quarter of the time and shows as much
LARGEST = 20000  # pixels on a side; the renderer's own limit is 65,536, memory's comes sooner
FONT = ["DejaVu Sans"]  # ships with matplotlib: the same picture everywhere
POINT = 72.0 / 100.0  # one layout px in points, at 100 px to the inch
_BACK, _EDGES, _NODES = 1, 2, 3  # z-order


def write_png(scene: Scene, path: FilePath) -> None:
    """Draw ``scene`` into ``path``."""
    wanted = SCALE if len(scene.curves) <= DENSE else DENSE_SCALE
    scale = min(wanted, LARGEST / max(scene.width, scene.height))
    figure = Figure(figsize=(scene.width / 100, scene.height / 100), dpi=100 * scale, facecolor=LIGHT["page"])
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-MARGIN, scene.width - MARGIN)
    axes.set_ylim(scene.height - scene.top, -scene.top)
    axes.axis("off")
    _add(axes, scene.back, _BACK)
    axes.add_collection(_curves(scene), autolim=False)
    for parts in scene.nodes:
        _add(axes, parts, _NODES)
    _add(axes, scene.front, _NODES)
    with warnings.catch_warnings():
        # A name in a script that no installed font covers is drawn as boxes; that is no fault of the circuit.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        FigureCanvasAgg(figure).print_png(str(path))


def _add(axes: Axes, items: Iterable[Box | Text | Stroke], depth: int) -> None:
    for item in items:
        axes.add_artist(_artist(item, depth))


def _curves(scene: Scene) -> PathCollection:
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    collection = PathCollection(
        [Path(curve, codes) for curve in scene.curves],
        facecolors="none",
        edgecolors=[LIGHT[READER_KINDS[kind]] for kind in scene.kinds],
        linewidths=scene.widths * POINT,
        alpha=scene.opacity,
        zorder=_EDGES,
    )
    collection.set_capstyle("round")
    return collection


def _artist(item: Box | Text | Stroke, depth: int) -> Artist:
    if isinstance(item, Box):
        return _box(item, depth)
    if isinstance(item, Stroke):
        ends = ([item.x, item.x + item.length], [item.y, item.y])
        return Line2D(*ends, color=LIGHT[item.kind], linewidth=2.5 * POINT, solid_capstyle="round", zorder=depth)
    style = TEXTS[item.style]
    return Label(
        item.x,
        item.y,
        item.text,
        color=LIGHT[style.fill],
        fontsize=style.size * POINT,
        fontweight="bold" if style.bold else "normal",
        fontfamily=FONT,
        horizontalalignment="center" if item.anchor == "middle" else "left",
        verticalalignment="baseline",
        parse_math=False,  # a name may hold dollar signs
        zorder=depth,
    )


def _box(item: Box, depth: int) -> FancyBboxPatch:
    style = BOXES[item.style]
    radius = min(style.radius, item.width / 2, item.height / 2)
    return FancyBboxPatch(
        (item.x, item.y),
        item.width,
        item.height,
        boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=LIGHT[style.fill] if style.fill else "none",
        edgecolor=LIGHT[style.stroke] if style.stroke else "none",
        linewidth=style.stroke_width * POINT,
        linestyle=(0, (3, 2)) if style.dashed else "solid",
        zorder=depth,
    )

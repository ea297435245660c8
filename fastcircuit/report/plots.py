"""Line plots and scatter plots, as SVG and PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcircuit.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", ".")
SUFFIXES = (".svg", ".png")
WIDTH, HEIGHT = 4.6, 3.6  # of one panel, inches
DPI = 160

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Line:
    """One line: points in order of x; ``low`` and ``high`` bound a band around it."""

    label: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None
    style: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        level: a y at which to draw a dotted line, with its name.
        points: a scatter ``(x, y)`` instead of lines.
        diagonal: draw y = x.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    log_x: bool = False
    log_y: bool = False
    level: tuple[str, float] | None = None
    points: tuple[Values, Values] | None = None
    diagonal: bool = False
    title: str = ""


def save_plot(panels: Sequence[Panel], path: Path, title: str, columns: int = 2) -> list[Path]:
    """Draw panels side by side, one legend for all, into ``path.svg`` and ``path.png``."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    # Text stays text and ids do not change from run to run, so that a plot changes only when its numbers do.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastcircuit", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=False):
            handles |= _draw(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8.5
            )
        written = [path.with_suffix(suffix) for suffix in SUFFIXES]
        for target in written:
            _save(figure, target)
    return written


def _save(figure: Any, target: Path) -> None:
    metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
    write_atomically(target, lambda temporary: figure.savefig(temporary, dpi=DPI, metadata=metadata))


def _draw(axis: Any, panel: Panel) -> dict[str, Any]:
    """Draw one panel; returns what its legend names."""
    handles = {}
    for line in panel.lines:
        colour, marker = COLOURS[line.style % len(COLOURS)], MARKERS[line.style % len(MARKERS)]
        (handles[line.label],) = axis.plot(
            line.x, line.y, "--" if line.dashed else "-", color=colour, marker=marker, markersize=4, linewidth=1.4
        )
        if line.low is not None and line.high is not None:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if panel.points is not None:
        axis.scatter(*panel.points, s=14, color=COLOURS[0], alpha=0.6, linewidths=0)
    if panel.diagonal:
        _draw_diagonal(axis)
    if panel.level is not None:
        name, value = panel.level
        handles[name] = axis.axhline(value, color="#555555", linestyle=":", linewidth=1.2)
    if panel.log_x:
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
    if panel.log_y:
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
    axis.set_xlabel(panel.x_label, fontsize=9.5)
    axis.set_ylabel(panel.y_label, fontsize=9.5)
    axis.set_title(panel.title, fontsize=10)
    axis.tick_params(labelsize=8.5, which="both")
    axis.grid(alpha=0.25, linewidth=0.6)
    return handles


def _plain_numbers(axis: Any) -> None:
    """0.3 instead of 3 x 10^-1 on a log scale."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))


def _draw_diagonal(axis: Any) -> None:
    low, high = np.min([axis.get_xlim(), axis.get_ylim()]), np.max([axis.get_xlim(), axis.get_ylim()])
    axis.plot([low, high], [low, high], color="#999999", linewidth=0.8, linestyle=":")

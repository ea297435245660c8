"""Pictures of measurements: each from the latest rows of one device, its conditions in the caption, as SVG and PNG."""

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcircuit.benchmarks.curves import Curve, curves
from fastcircuit.benchmarks.rows import Row, latest
from fastcircuit.files import write_atomically

OURS, THEIRS = "#0b6e99", ("#c9742b", "#7a7a7a", "#8c5aa8", "#4d8b57")
WIDTH, CAPTION = 8.0, 0.45  # inches
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastcircuit",
}


def draw_all(rows: Sequence[Row], directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Draw every picture there are rows for; returns the files, and the suite that each missing one needs."""
    from matplotlib import rc_context

    found = _one_device(rows)
    drawn: list[Path] = []
    missing = {}
    with rc_context(STYLE):
        for name, (suite, draw) in PICTURES.items():
            chosen = [row for row in found if suite == "all" or row.suite == suite]
            figure = draw(chosen)
            if figure is None:
                missing[name] = suite
            else:
                drawn += _save(figure, directory / name, chosen)
    return drawn, missing


def _one_device(rows: Sequence[Row]) -> list[Row]:
    """The latest rows of the device and number of threads that were measured last; full runs before quick ones."""
    if not rows:
        return []
    last = max(reversed(rows), key=lambda row: row.date)
    here = [row for row in rows if (row.device, row.threads) == (last.device, last.threads)]
    found = list(latest(here).values())
    full = {row.suite for row in found if not row.quick}
    return [row for row in found if not (row.quick and row.suite in full)]


def roofline(rows: Sequence[Row]) -> Any:
    """Operations per second against operations per byte, under what the machine can do."""
    import numpy as np

    rows = [row for row in rows if row.flops and row.bytes and row.matmul_gflops and row.stream_gbs]
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, axes = _figure(4.6, columns=len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=True):
        of_dtype = [row for row in rows if row.dtype == dtype]
        intensity = {id(row): (row.flops or 0) / (row.bytes or 1) for row in of_dtype}
        x = np.geomspace(min(intensity.values()) / 2, max(intensity.values()) * 2, 100)
        peak = max(row.matmul_gflops or 0 for row in of_dtype)
        streams = sorted(row.stream_gbs or 0 for row in of_dtype)
        for stream, style in dict(zip((streams[-1], streams[0]), ("-", "--"), strict=True)).items():
            label = f"{_number(stream)} GB/s, {_number(peak)} GFLOP/s"
            axis.plot(x, np.minimum(peak, stream * x), style, color="black", lw=1, label=label)
        names = _variants(of_dtype)
        for name in names:
            points = [row for row in of_dtype if row.variant == name]
            for direction, marker in (("forward", "o"), ("backward", "^")):
                chosen = [row for row in points if row.name.endswith(direction)]
                axis.plot(
                    [intensity[id(row)] for row in chosen],
                    [(row.flops or 0) / row.p50_ms / 1e6 for row in chosen],
                    marker,
                    color=_colour(name, names),
                    ms=5,
                    label=f"{name}, {direction}",
                )
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=f"masked_read, {dtype}")
        for ticks in (axis.xaxis, axis.yaxis):
            _plain_log_ticks(ticks)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes[0].set_ylabel("GFLOP/s")
    return figure


def speedups(rows: Sequence[Row]) -> Any:
    """How many times as fast ours is, case by case, with the 95 % interval; a tick where there is a bound."""
    rows = [row for row in rows if row.ratio is not None and row.variant != row.baseline and not row.axis]
    rows = [row for row in rows if row.variant in ("fastcircuit", "computed", "from the cache")]
    if not rows:
        return None
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.suite):
        groups.setdefault(_heading(row), []).append(row)
    lines = len(rows) + len(groups)
    figure, (axis,) = _figure(0.8 + 0.17 * lines)
    place, labels = float(lines), []
    for heading, of_group in groups.items():
        labels.append(heading)
        place -= 1
        for row in of_group:
            labels.append(textwrap.shorten(row.shape, 75, placeholder=" ..."))
            place -= 1
            _speedup(axis, place, row)
    axis.set_yticks(range(lines), labels[::-1], fontsize=7)
    axis.tick_params(axis="y", length=0)
    for label in axis.get_yticklabels():
        if label.get_text() in groups:
            label.set_fontweight("bold")
    axis.axvline(1, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="times as fast as the baseline (orange: the bound)", ylim=(-0.8, lines - 0.2))
    axis.set_xlim(min(0.8, *(row.ratio_low or 1 for row in rows)) / 1.1, max(row.ratio_high or 1 for row in rows) * 4)
    _plain_log_ticks(axis.xaxis)
    axis.set_title("Speed-up, median of ratios within rounds")
    return figure


def _speedup(axis: Any, place: float, row: Row) -> None:
    """One bar from 1 to the ratio, its interval, and its bound."""
    ratio, low, high = row.ratio or 0.0, row.ratio_low or 0.0, row.ratio_high or 0.0
    line = {"lw": 1, "ecolor": "#333333"}
    axis.barh(place, ratio - 1, left=1, xerr=[[ratio - low], [high - ratio]], color=OURS, height=0.6, error_kw=line)
    if row.bound:
        axis.plot([row.bound] * 2, [place - 0.35, place + 0.35], color=THEIRS[0], lw=2)
    axis.text(max(high, row.bound or 0, 1) * 1.06, place, f"{_number(ratio)}x {row.baseline}", va="center", fontsize=7)


def memory(rows: Sequence[Row]) -> Any:
    """Peak memory of a training step against the tokens of its batch."""
    return _curves(
        [c for c in curves(rows) if c.what == "peak_bytes" and c.axis == "tokens"],
        "tokens in the batch",
        "peak memory above the model, MB",
        1e-6,
    )


def sparsity(rows: Sequence[Row]) -> Any:
    """Time of a training step against how many edges are off."""
    found = [c for c in curves(rows) if c.what == "p50_ms" and c.axis == "sparsity"]
    return _curves(found, "share of edges whose mask is 0", "training step, ms", 1.0, log=False)


def latency(rows: Sequence[Row]) -> Any:
    """Time of model and submodel relative to the baseline, a column per batch; a tick at the least its work allows."""
    if not rows:
        return None
    shapes, cases = (list(dict.fromkeys(getattr(row, what) for row in rows)) for what in ("shape", "name"))
    names = _variants(rows)
    places = _places(cases, names, rows)
    figure, axes = _figure(1.1 + 0.14 * (max(places.values()) + 1), columns=len(shapes))
    for axis, shape in zip(axes, shapes, strict=True):
        for row in [row for row in rows if row.shape == shape]:
            baseline = next((r for r in rows if (r.name, r.shape, r.variant) == (row.name, shape, row.baseline)), row)
            _latency(axis, places[row.name, row.variant], row, baseline.p50_ms, _colour(row.variant, names))
        axis.set_title(shape, fontsize=9)
        axis.margins(x=0.25)
        axis.set_ylim(-1, max(places.values()) + 1)
        axis.set_yticks([])
    middle = {case: [at for (name, _), at in places.items() if name == case] for case in cases}
    labels = [textwrap.fill(case, 25) for case in cases]
    axes[0].set_yticks([sum(middle[case]) / len(middle[case]) for case in cases], labels, fontsize=7)
    handles = [_patch(_colour(name, names), name) for name in names]
    figure.legend(handles=handles, fontsize=7, loc="outside upper center", ncols=len(names))
    axes[len(axes) // 2].set_xlabel("time over the baseline's, p20 to p80 (black tick: the bound)")
    return figure


def _places(cases: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Where the bar of each case and variant lies, the same in every column, from the bottom up."""
    known, places, place = {(row.name, row.variant) for row in rows}, {}, 0.0
    for case in cases[::-1]:
        for name in [name for name in names[::-1] if (case, name) in known]:
            places[case, name] = place
            place += 1
        place += 0.8
    return places


def _latency(axis: Any, place: float, row: Row, whole: float, colour: str) -> None:
    """One bar: milliseconds over ``whole``."""
    spread = [[(row.p50_ms - row.p20_ms) / whole], [(row.p80_ms - row.p50_ms) / whole]]
    axis.barh(place, row.p50_ms / whole, xerr=spread, color=colour, height=0.8, error_kw={"lw": 1})
    right = max(row.p80_ms / whole, 1 / row.bound if row.bound else 0.0) + 0.03
    axis.text(right, place, _milliseconds(row.p50_ms), va="center", fontsize=7)
    if row.bound:
        axis.plot([1 / row.bound] * 2, [place - 0.45, place + 0.45], color="black", lw=1.5)


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Any]]] = {
    "roofline": ("ops", roofline),
    "speedups": ("all", speedups),
    "memory": ("scaling", memory),
    "sparsity": ("scaling", sparsity),
    "latency": ("inference", latency),
}


def _curves(found: Sequence[Curve], xlabel: str, ylabel: str, scale: float, log: bool = True) -> Any:
    if not found:
        return None
    figure, (axis,) = _figure(3.6)
    for number, curve in enumerate(sorted(found, key=lambda curve: "published" in curve.case)):
        x = sorted(curve.points)
        colour = THEIRS[0] if "published" in curve.case else OURS
        exponent = "" if curve.exponent is None else f" (exponent {curve.exponent:.2f})"
        label = curve.case.split("/")[1] + exponent
        axis.plot(x, [curve.points[value] * scale for value in x], "o-", color=colour, label=label, zorder=3 - number)
    if log:
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(sorted(found[0].points), [f"{value:g}" for value in sorted(found[0].points)])
        axis.minorticks_off()
        _plain_log_ticks(axis.yaxis)
    else:
        axis.set_ylim(bottom=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(found[0].case.split("/")[2].split(": ")[-1], fontsize=9, fontweight="normal")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height + CAPTION), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _save(figure: Any, path: Path, rows: Sequence[Row]) -> list[Path]:
    caption = CAPTION / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, caption, 1, 1 - caption))
    figure.text(0.01, 0.01, _conditions(rows), fontsize=6.5, color="#444444", va="bottom")
    written = []
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)
        target = path.with_suffix(f".{kind}")
        write_atomically(target, functools.partial(_write, buffer.getvalue()))
        written.append(target)
    return written


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _conditions(rows: Sequence[Row]) -> str:
    """Where, with what and when, of all rows of a picture."""
    last = rows[-1]
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    dates = " to ".join(dict.fromkeys((min(row.date for row in rows), max(row.date for row in rows))))
    quick = ", quick shapes" if any(row.quick for row in rows) else ""
    triton = f", triton {last.triton}" if last.device.startswith("cuda") else ""
    text = (
        f"{last.device}, {last.threads} thread{'s' * (last.threads > 1)}, {last.cpu_flags}; {dtypes}; "
        f"torch {last.torch}{triton}; medians of {min(row.rounds for row in rows)} to "
        f"{max(row.rounds for row in rows)} interleaved rounds{quick}; commit {commits}; {dates}"
    )
    return "\n".join(textwrap.wrap(text, 150))


def _heading(row: Row) -> str:
    what = row.name if row.variant == "fastcircuit" else f"{row.name}, {row.variant}"
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{row.suite}: {what}{dtype}"


def _variants(rows: Sequence[Row]) -> list[str]:
    """Ours first, then the others as they come."""
    names = list(dict.fromkeys(row.variant for row in rows))
    return sorted(names, key=lambda name: not name.startswith("fastcircuit"))


def _colour(name: str, names: Sequence[str]) -> str:
    if name == "fastcircuit":
        return OURS
    if name.startswith("fastcircuit"):
        return "#63b3d4"
    others = [other for other in names if not other.startswith("fastcircuit")]
    return THEIRS[others.index(name) % len(THEIRS)]


def _plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20, ... as plain numbers; 1, 10, 100, ... over more than three decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}")
    axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _patch(colour: str, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=name)

"""One look for all three formats: palettes, text and box styles by name, and how lines thin out as edges multiply.

Line colours are Okabe and Ito's colour-blind-safe set (purple darkened for thin lines on white); the letters q, k, v
on the nodes say the same without colour.
"""

from dataclasses import dataclass

from fastcircuit.report.components import READER_KINDS, ReaderKind

FONTS = "Inter, Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
READER_LABELS: dict[ReaderKind, str] = {
    "q": "query",
    "k": "key",
    "v": "value",
    "mlp": "MLP input",
    "output": "output",
}
DENSE = 2500  # edges; from here on single lines cannot be told apart and the drawing says so
# Lines are drawn at ``most`` opacity up to ``comfortable`` edges; the page follows the same rule when it filters.
OPACITY = {"most": 0.9, "least": 0.06, "comfortable": 40.0, "fall": 0.25}

LIGHT = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5a6470",
    "band": "#f4f6f8",
    "head": "#ffffff",
    "kv": "#fff6e6",
    "mlp-node": "#f7ebf3",
    "end": "#e6ebf0",
    "line": "#4a5663",
    "faint": "#c3cad2",
    "q": "#0072b2",
    "k": "#d55e00",
    "v": "#009e73",
    "mlp": "#b5599a",
    "output": "#4d4d4d",
}
DARK = {
    "page": "#12161b",
    "ink": "#e8ecf1",
    "muted": "#a3adb8",
    "band": "#1a2027",
    "head": "#242c35",
    "kv": "#3a3120",
    "mlp-node": "#372b36",
    "end": "#2e3843",
    "line": "#8b97a5",
    "faint": "#3d4752",
    "q": "#56b4e9",
    "k": "#f0913a",
    "v": "#1fc39a",
    "mlp": "#e08fc4",
    "output": "#cfd4da",
}


@dataclass(frozen=True)
class BoxStyle:
    """Palette names of fill and stroke (None: none), stroke width, corner radius."""

    fill: str | None
    stroke: str | None
    stroke_width: float = 1.0
    radius: float = 6.0
    dashed: bool = False


@dataclass(frozen=True)
class TextStyle:
    """Size in px, palette name of the colour, weight."""

    size: float
    fill: str
    bold: bool = False


BOXES: dict[str, BoxStyle] = {
    "band": BoxStyle("band", None, 0.0, 4.0),
    "group": BoxStyle("band", "faint", 1.0, 9.0),
    "head": BoxStyle("head", "line"),
    "kv": BoxStyle("kv", "line", dashed=True),
    "mlp-node": BoxStyle("mlp-node", "line", radius=4.0),
    "embedding": BoxStyle("end", "line", radius=13.0),
    "output-node": BoxStyle("end", "line", radius=13.0),
    "idle": BoxStyle("head", "faint"),
}
TEXTS: dict[str, TextStyle] = {
    "title": TextStyle(15.0, "ink", bold=True),
    "caption": TextStyle(12.0, "muted"),
    "notice": TextStyle(12.0, "ink", bold=True),
    "band-label": TextStyle(11.0, "muted"),
    "label": TextStyle(11.0, "ink"),
    "idle-label": TextStyle(11.0, "muted"),
    "legend": TextStyle(11.0, "ink"),
    **{f"port-{kind}": TextStyle(9.0, kind, bold=True) for kind in ("q", "k", "v")},
}


def edge_style(num_edges: int) -> tuple[float, float]:
    """Line width in px and opacity for a drawing of ``num_edges``: bold for tens, thin and faint for thousands."""
    crowding = max(1.0, num_edges / OPACITY["comfortable"])
    opacity = OPACITY["most"] * crowding ** -OPACITY["fall"]
    return max(0.4, 1.9 * crowding**-0.2), max(OPACITY["least"], opacity)


def css(palette: dict[str, str], scope: str = "") -> str:
    """Style sheet of the drawing under ``palette``; plain colours, because print tools know no CSS variables."""
    rules = [f"{scope}text {{ font-family: {FONTS}; }}", f"{scope}.page {{ fill: {palette['page']}; }}"]
    for name, box in BOXES.items():
        fill, stroke = (palette[role] if role else "none" for role in (box.fill, box.stroke))
        dash = " stroke-dasharray: 3 2;" if box.dashed else ""
        rules.append(f"{scope}.{name} {{ fill: {fill}; stroke: {stroke}; stroke-width: {box.stroke_width:g};{dash} }}")
    for name, text in TEXTS.items():
        weight = " font-weight: 600;" if text.bold else ""
        rules.append(f"{scope}.{name} {{ fill: {palette[text.fill]}; font-size: {text.size:g}px;{weight} }}")
    rules += [f"{scope}.edge-{kind} {{ fill: none; stroke: {palette[kind]}; }}" for kind in READER_KINDS]
    return "\n".join(rules)

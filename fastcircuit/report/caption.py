"""The words on a drawing: title, caption lines, notices; safe for XML whatever a circuit file holds."""

import re
import textwrap
from collections.abc import Mapping
from numbers import Real
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.report.style import DENSE

MOST_METRICS = 6
MOST_CHARACTERS = 160  # of one name or value taken from a file

# XML 1.0 allows no control characters; lone surrogates cannot be encoded; bidi overrides would reorder the caption.
_UNPRINTABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def printable(value: object) -> str:
    """``value`` as one line that XML, HTML and UTF-8 can all hold, shortened if very long."""
    text = " ".join(_UNPRINTABLE.sub("\ufffd", str(value)).split())
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def title(circuit: Circuit) -> str:
    """``task in model``, as far as the circuit says."""
    model = circuit.model.get("name") or circuit.model.get("architecture")
    task = printable(circuit.task) if circuit.task else "Circuit"
    return f"{task} in {printable(model)}" if model else task


def caption(circuit: Circuit) -> list[str]:
    """Size and ablation, then the measured numbers if there are any."""
    share = 100 * circuit.num_edges / circuit.graph.num_edges
    ablation = f"{circuit.ablation} ablation" + (", output bias kept" if circuit.keeps_output_bias else "")
    lines = [f"{circuit.num_edges:,} of {circuit.graph.num_edges:,} edges ({share:.3g} %) · {ablation}"]
    where, numbers = _metrics(circuit.metrics)
    if numbers:
        lines.append(f"{where}: " + " · ".join(f"{printable(name)} {value:.4g}" for name, value in numbers))
    return lines


def notices(circuit: Circuit) -> list[str]:
    """What a reader must know to read the picture right."""
    if not circuit.num_edges:
        return [
            "This circuit has no edges: the nodes are the whole model's, and every one carries ablated activations."
        ]
    if circuit.num_edges > DENSE:
        return [
            f"Dense: {circuit.num_edges:,} lines overlap. Single edges can be told apart in the .html drawing only."
        ]
    return []


def wrapped(text: str, width: float, size: float) -> list[str]:
    """``text`` in lines that fit ``width`` px at font size ``size``."""
    return textwrap.wrap(text, max(20, int(width / (0.58 * size))), break_long_words=True) or [""]


def _metrics(metrics: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    """The numbers of the test split if they are told apart, else all the top-level ones."""
    test = metrics.get("test")
    where, source = ("test", test) if isinstance(test, Mapping) else ("metrics", metrics)
    numbers = [
        (str(name), float(value))
        for name, value in source.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    ]
    return where, numbers[:MOST_METRICS]

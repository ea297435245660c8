"""Curves from rows: what is against what, and the exponent fitted to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from statistics import median
from typing import Any

from fastcircuit.benchmarks.case import Case
from fastcircuit.benchmarks.rows import Row
from fastcircuit.benchmarks.runner import NOISE


@dataclass(frozen=True)
class Curve:
    """``what`` (``p50_ms`` or ``peak_bytes``) against ``axis``, point by point.

    Args:
        exponent: of ``y = c x^e``; None where x has a 0 (sparsity).
        accepted: what the exponent may be.
        falls: the last point must lie below the first by more than NOISE, what a measurement may be off.
    """

    case: str
    axis: str
    what: str
    points: dict[float, float]
    exponent: float | None
    accepted: tuple[float, float] | None
    falls: bool = False

    def problem(self) -> str | None:
        return self._too_steep() or self._too_flat()

    def _too_flat(self) -> str | None:
        if not self.falls:
            return None
        first, last = min(self.points), max(self.points)
        if self.points[last] < (1 - NOISE) * self.points[first]:
            return None
        return (
            f"{self.case}: {self.what} does not fall with {self.axis}: {self.points[first]:.4g} at {first:g}, "
            f"{self.points[last]:.4g} at {last:g}; accepted: less than {1 - NOISE:g} of the first"
        )

    def _too_steep(self) -> str | None:
        if self.accepted is None or self.exponent is None or self.accepted[0] <= self.exponent <= self.accepted[1]:
            return None
        low, high = self.accepted
        return (
            f"{self.case}: {self.what} grows with {self.axis} to the {self.exponent:.2f}; accepted: {low:g} to {high:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "axis": self.axis,
            "what": self.what,
            "exponent": None if self.exponent is None else round(self.exponent, 3),
            "accepted": self.accepted,
        }

    def __str__(self) -> str:
        grows = "" if self.exponent is None else f", {self.axis}^{self.exponent:.2f}"
        return f"{self.case}: {self.what} {min(self.points.values()):.4g} to {max(self.points.values()):.4g}{grows}"


def curves(rows: Sequence[Row], cases: Sequence[Case] = ()) -> list[Curve]:
    """The curves among ``rows``; ``cases`` say which exponents are accepted, and which times must fall."""
    known = {case.key: case for case in cases}
    found = []
    for case in dict.fromkeys(row.case for row in rows if row.axis):
        points = [row for row in rows if row.case == case]
        for what in ("p50_ms", "peak_bytes"):
            values = {float(row.variant): getattr(row, what) for row in points if getattr(row, what)}
            if len(values) > 1:
                of = known.get(case)
                accepted, falls = (of.exponents, of.falls and what == "p50_ms") if of else (None, False)
                found.append(Curve(case, points[0].axis, what, values, steepness(values), accepted, falls))
    return found


def steepness(curve: dict[float, float]) -> float | None:
    """The median slope between all pairs of points on log scales (Theil and Sen): one slow point does not move it."""
    if min(curve) <= 0:
        return None
    return median(log(curve[b] / curve[a]) / log(b / a) for a, b in combinations(sorted(curve), 2))

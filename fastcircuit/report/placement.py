"""Order and horizontal position of boxes in rows: barycentre sweeps, then least-squares placement without overlap."""

from dataclasses import dataclass

import numpy as np

SWEEPS = 12


@dataclass(frozen=True)
class Links:
    """Lines between boxes; ``*_offset`` is how far from its box's centre a line leaves or lands."""

    source: np.ndarray
    target: np.ndarray
    source_offset: np.ndarray
    target_offset: np.ndarray


def place(
    rows: list[list[int]], widths: np.ndarray, links: Links, total: float, gaps: tuple[float, float]
) -> np.ndarray:
    """Centre x of every box, between 0 and ``total`` or, if wider, :func:`row_width`; rows are given bottom first.

    Boxes are pulled towards the mean of the boxes they are linked to, near ones more than far ones; a row keeps at
    least the first of ``gaps`` between its boxes, more (up to the second) where it has room. Deterministic.
    """
    gap, most_gap = gaps
    total = max(total, row_width(rows, widths, gap))
    order = [list(row) for row in rows]
    x = np.zeros(len(widths))
    for row in order:
        x[row] = _settle(np.full(len(row), total / 2), np.ones(len(row)), widths[row], gap, most_gap, total)
    below, above = _pulls(rows, links, len(widths)), _pulls(rows, _flipped(links), len(widths))
    for sweep in range(SWEEPS):
        # Early sweeps look one way only, which is what untangles; the last ones balance both sides.
        looks = (below, above) if sweep >= SWEEPS - 4 else ((below,), (above,))[sweep % 2]
        for index in range(len(order)) if sweep % 2 == 0 else reversed(range(len(order))):
            row = order[index]
            wanted, weight = _barycentres(row, x, looks)
            ranked = np.argsort(wanted, kind="stable")
            order[index] = row = [row[rank] for rank in ranked]
            x[row] = _settle(wanted[ranked], weight[ranked], widths[row], gap, most_gap, total)
    return x


def row_width(rows: list[list[int]], widths: np.ndarray, gap: float) -> float:
    """Width of the widest row packed at ``gap``."""
    return max((float(widths[row].sum()) + gap * (len(row) - 1) for row in rows if row), default=0.0)


@dataclass(frozen=True)
class _Pull:
    """Per box: the boxes that pull at it, where the line ends relative to both centres, and how strongly."""

    boxes: list[np.ndarray]
    shifts: list[np.ndarray]
    weights: list[np.ndarray]


def _flipped(links: Links) -> Links:
    return Links(links.target, links.source, links.target_offset, links.source_offset)


def _pulls(rows: list[list[int]], links: Links, num_boxes: int) -> _Pull:
    """What pulls each link target towards its sources."""
    row_of = np.zeros(num_boxes, dtype=int)
    for index, row in enumerate(rows):
        row_of[row] = index
    by_target = np.argsort(links.target, kind="stable")
    cuts = np.searchsorted(links.target[by_target], np.arange(1, num_boxes))
    weight = 1.0 / np.maximum(1, np.abs(row_of[links.target] - row_of[links.source]))
    shift = links.source_offset - links.target_offset
    return _Pull(*(np.split(values[by_target], cuts) for values in (links.source, shift, weight)))


def _barycentres(row: list[int], x: np.ndarray, looks: tuple[_Pull, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where each box of a row wants to be and how strongly; a box without links stays where it is."""
    wanted, strength = x[row].copy(), np.full(len(row), 1e-3)
    for place_in_row, box in enumerate(row):
        sums = [
            (float((p.weights[box] * (x[p.boxes[box]] + p.shifts[box])).sum()), float(p.weights[box].sum()))
            for p in looks
        ]
        pull = sum(weight for _, weight in sums)
        if pull:
            wanted[place_in_row], strength[place_in_row] = sum(at for at, _ in sums) / pull, pull
    return wanted, strength


def _settle(
    wanted: np.ndarray, weight: np.ndarray, widths: np.ndarray, gap: float, most_gap: float, total: float
) -> np.ndarray:
    """Positions closest to ``wanted`` (weighted least squares) that keep the order, the gaps and the bounds.

    With the room taken by the boxes to the left subtracted, "no overlap" reads "never decreasing": isotonic
    regression, solved by pooling neighbours; clipping its solution to bounds solves the bounded problem.
    """
    room = (total - widths.sum()) / (len(widths) + 1)
    spacing = min(max(gap, room), most_gap)
    steps = (widths[1:] + widths[:-1]) / 2 + spacing
    taken = np.concatenate([[0.0], np.cumsum(steps)])
    level = _never_decreasing(wanted - taken, weight)
    low, high = widths[0] / 2, total - taken[-1] - widths[-1] / 2
    return np.clip(level, low, max(low, high)) + taken


def _never_decreasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Isotonic regression by pool-adjacent-violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, mass, count = pools.pop()
            both = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / both, both, count + pool[2])
        pools.append(pool)
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])

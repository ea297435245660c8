"""Curves of edges: one cubic Bezier each, bowed aside where a straight one would run behind a node or along others."""

from dataclasses import dataclass

import numpy as np

CELL = 6.0  # px; of the grid that remembers where nodes and earlier curves are
SAMPLES = 80
MOST_ROUTED = 2500  # beyond this the picture is a texture whatever the detours, and routing would take seconds

SPARSE = 150  # up to here every line is followed by eye, and there is time to try more detours

# Cost of a pixel behind a node and of one along another curve; of a pixel aside; of the bend that makes.
BEHIND_NODE, ALONG_CURVE, ASIDE, BEND = 30.0, 1.0, 0.06, 60.0


def _detours(num_edges: int) -> np.ndarray:
    """Detours to choose from ``[n, 2]``, px aside at the lower and at the upper end: S-shapes and wide arcs."""
    steps = (30, 60, 100, 150, 220, 300) if num_edges <= SPARSE else (36, 72, 120)
    near = [0, *(side * step for step in steps for side in (1, -1))]
    far = [side * step for step in (160, 200, 250, 300) for side in (1, -1)]
    return np.array([(low, high) for low in near for high in near] + [(both, both) for both in far], dtype=float)


@dataclass(frozen=True)
class Obstacles:
    """Boxes ``left, top, right, bottom`` that curves should not run behind, ``[num_boxes, 4]``."""

    boxes: np.ndarray
    width: float
    height: float
    margin: float = 4.0

    def grid(self) -> np.ndarray:
        """Box number + 1 per cell, 0 where free."""
        cells = np.zeros((int(self.height / CELL) + 2, int(self.width / CELL) + 2), dtype=np.int32)
        for number, (left, top, right, bottom) in enumerate(self.boxes):
            low_x, high_x = max(0, int((left - self.margin) / CELL)), int((right + self.margin) / CELL) + 1
            low_y, high_y = max(0, int((top - self.margin) / CELL)), int((bottom + self.margin) / CELL) + 1
            cells[low_y:high_y, low_x:high_x] = number + 1
        return cells


def curves(starts: np.ndarray, ends: np.ndarray, own_boxes: np.ndarray, obstacles: Obstacles) -> np.ndarray:
    """Control points ``[num_edges, 4, 2]`` of curves from ``starts`` up to ``ends`` (both ``[num_edges, 2]``).

    ``own_boxes`` ``[num_edges, 2]`` are the boxes an edge joins, which are no obstacles to it. Short edges choose
    first, because long ones have more room to give way.
    """
    points = bezier(starts, ends, np.zeros((len(starts), 2)))
    if len(starts) > MOST_ROUTED:
        return points
    detours = _detours(len(starts))
    taken = obstacles.grid()
    crowd = np.zeros(taken.shape, dtype=np.float32)
    inner = slice(SAMPLES // 10, -SAMPLES // 10)  # all curves of a node meet at its ends: no crowding there
    for edge in np.argsort(starts[:, 1] - ends[:, 1], kind="stable"):
        choices = bezier(starts[edge], ends[edge], detours)
        column, row, outside = _cells(_sample(choices), taken.shape)
        there = taken[row, column]
        behind = (there > 0) & (there != own_boxes[edge, 0] + 1) & (there != own_boxes[edge, 1] + 1)
        length = starts[edge, 1] - ends[edge, 1]
        along = crowd[row, column][:, inner].mean(axis=1) * length
        cost = BEHIND_NODE * (behind | outside).mean(axis=1) * length + ALONG_CURVE * along + _bending(detours, length)
        best = int(cost.argmin())
        points[edge] = choices[best]
        _leave_trace(crowd, row[best, inner], column[best, inner])
    return points


def _leave_trace(crowd: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    """Mark the cells of a chosen curve, and those beside it, once each: closer than that looks like one line."""
    for step, crowding in ((-1, 0.5), (0, 1.0), (1, 0.5)):
        cells = np.unique(np.stack([row, np.clip(column + step, 0, crowd.shape[1] - 1)]), axis=1)
        crowd[cells[0], cells[1]] += crowding


def _bending(detours: np.ndarray, rise: float) -> np.ndarray:
    """What each detour costs an edge that climbs ``rise``, whatever it meets."""
    return ASIDE * np.abs(detours).sum(axis=1) + BEND * np.square(detours / rise).sum(axis=1)


def bezier(starts: np.ndarray, ends: np.ndarray, asides: np.ndarray) -> np.ndarray:
    """Control points ``[n, 4, 2]`` of curves pushed ``asides`` ``[n, 2]`` px at both ends, vertical there if 0."""
    starts, ends = np.broadcast_to(starts, asides.shape), np.broadcast_to(ends, asides.shape)
    rise = starts[:, 1] - ends[:, 1]
    lift = np.minimum(0.45 * rise, 40.0 + 0.25 * rise)
    most = 0.6 * rise[:, None]  # a short edge that went far aside would loop
    aside = np.clip(asides, -most, most)
    first = np.stack([starts[:, 0] + aside[:, 0], starts[:, 1] - lift], axis=1)
    second = np.stack([ends[:, 0] + aside[:, 1], ends[:, 1] + lift], axis=1)
    return np.stack([starts, first, second, ends], axis=1)


_T = np.linspace(0.0, 1.0, SAMPLES)[:, None]
_BASIS = np.concatenate([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], axis=1)  # Bernstein


def _sample(points: np.ndarray) -> np.ndarray:
    """``[n, SAMPLES, 2]`` points along curves ``[n, 4, 2]``."""
    return _BASIS @ points


def _cells(samples: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, row and "left the drawing" of every sample."""
    column, row = (np.floor(samples[..., axis] / CELL).astype(int) for axis in (0, 1))
    outside = (column < 0) | (column >= shape[1])
    return np.clip(column, 0, shape[1] - 1), np.clip(row, 0, shape[0] - 1), outside

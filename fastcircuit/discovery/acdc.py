"""ACDC: from the output down, remove every edge whose removal raises the KL by less than a threshold.

Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", algorithm 1. Edges are
visited in reverse canonical order: readers from the last to the first, and for each reader its writers from the last to
the first. An edge goes if ``KL(without it) - KL(with it) < threshold``, both in the circuit that is left at that time.

The decisions are those of one full forward pass per edge, up to rounding. What is saved: the pass begins at the edge's
reader and runs only what changes (see ``incremental.py``); an edge into a component that no kept path joins to the
output, or out of a writer that is the same clean and ablated, raises nothing and is not run; and edges are tried ahead,
many at once, as if those before were removed. What follows the first that is not is thrown away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastcircuit.discovery.incremental import IncrementalRun, Trial
from fastcircuit.discovery.points import clean_points
from fastcircuit.discovery.scores import check_computed
from fastcircuit.errors import InputError
from fastcircuit.evaluation.reference import Reference

BATCH_BYTES = 2**28
COPY_BYTES = 2**24
COLUMNS = ("edge", "rise", "removed", "kl")

OnEdge = Callable[[int, int, float], None]


@dataclass(frozen=True)
class AcdcResult:
    """What ACDC decided.

    Args:
        keep: bool ``[num_edges]``.
        rises: of the KL without each edge, when it was decided, nats, ``[num_edges]``.
        history: one row per edge in the order they were decided: edge, rise, removed (1 or 0), KL after it.
    """

    keep: np.ndarray
    rises: np.ndarray
    history: np.ndarray


def acdc(reference: Reference, threshold: float, on_edge: OnEdge | None = None) -> AcdcResult:
    """Decide over every edge, on all examples of ``reference``, whose clean and corrupted runs are held in memory.

    Args:
        threshold: nats.
        on_edge: called with the edges decided, how many there are, and the KL.

    Raises:
        InputError: the threshold is negative or NaN.
        RunError: a KL is not finite.
    """
    check_threshold(threshold)
    return _Search(reference, threshold, on_edge).run()


def check_threshold(threshold: float) -> None:
    """InputError unless ``threshold`` is a number from 0."""
    if not threshold >= 0:
        raise InputError(f"threshold is {threshold}; acdc needs a KL rise in nats, 0 or more")


class _Search:
    def __init__(self, reference: Reference, threshold: float, on_edge: OnEdge | None) -> None:
        self.graph, self.threshold, self.on_edge = reference.model.graph, threshold, on_edge
        self.keep = np.ones(self.graph.num_edges, dtype=bool)
        points = clean_points(reference, "kl", BATCH_BYTES)
        self.runs = [IncrementalRun(point, self.keep) for point in points]
        self.examples = sum(run.point.batch.size for run in self.runs)
        tokens = max(run.num_tokens for run in self.runs)
        copy = 8 * tokens * reference.model.config.hidden_size * reference.model.dtype.itemsize
        self.most = max(1, COPY_BYTES // copy)
        self.width, self.kl = 1, 0.0
        self.history: list[tuple[float, ...]] = []

    def run(self) -> AcdcResult:
        for number in reversed(range(len(self.graph.sites))):
            self._enter(number)
            site = self.graph.sites[number]
            for row in reversed(range(site.num_readers)):
                self._decide_reader(number, row)
        history = np.array(self.history)
        rises = np.zeros(self.graph.num_edges)
        rises[history[:, 0].astype(int)] = history[:, 1]
        check_computed(self.graph, rises)
        return AcdcResult(self.keep, rises, history)

    def _enter(self, number: int) -> None:
        for run in self.runs:
            run.enter(number)
        self.live = self.graph.live(self.keep)[1]

    def _decide_reader(self, number: int, row: int) -> None:
        site = self.graph.sites[number]
        first = site.first_edge + row * site.num_writers
        differs = np.zeros(site.num_writers, dtype=bool)
        if self.live[site.first_reader + row]:
            differs = np.any([run.differs(number, row) for run in self.runs], axis=0)
        waiting: list[int] = []
        for writer in reversed(range(site.num_writers)):
            if differs[writer]:
                waiting.append(writer)
            else:
                self._decide(first + writer, 0.0, self.kl)
        while waiting:
            ahead = waiting[: min(self.width, self.most)]
            trials = [run.without(number, row, ahead) for run in self.runs]
            kls = (torch.stack([trial.losses for trial in trials]).sum(0) / self.examples).tolist()
            waiting = waiting[self._accept(first, ahead, kls, trials) :]

    def _accept(self, first: int, ahead: list[int], kls: list[float], trials: list[Trial]) -> int:
        """Decide over edges tried ahead, up to the first that stays; returns how many were decided."""
        removed = 0
        for writer, kl in zip(ahead, kls, strict=True):
            if not self._decide(first + writer, kl - self.kl, kl):
                break
            removed += 1
        if removed:
            for trial in trials:
                trial.commit(removed - 1)
        if removed == len(ahead):
            self.width = min(self.most, 2 * max(self.width, len(ahead)))
            return removed
        self.width = max(1, removed)
        return removed + 1

    def _decide(self, edge: int, rise: float, kl: float) -> bool:
        """Remove an edge or let it stay; returns whether it was removed."""
        removed = rise < self.threshold
        if removed:
            self.keep[edge], self.kl = False, kl
        self.history.append((edge, rise, float(removed), self.kl))
        if self.on_edge is not None:
            self.on_edge(len(self.history), self.graph.num_edges, self.kl)
        return removed

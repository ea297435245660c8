"""Algorithm 1 at GPT-2 small shape, ours and the published loop, in one run.

150 patching and 150 validation prompts of 15 random tokens, mean ablation, heads and MLPs, float32. The published loop
costs the same for every candidate, so its time is that of CANDIDATES of its 156, half of them before ours and half
after, times 156. ``pytest bench/test_extraction.py --check-floors`` fails unless ours is at least 15 times faster at
each single threshold. Ours is faster the more is removed: hence thresholds, and a model, at which much stays.
"""

import statistics
import time

import pytest

from bench.cases.extraction import GPT2_SMALL_150, extract, opinionated, published
from bench.cases.training_step import random_model
from fastcircuit.extraction.prune import THRESHOLDS

SPEED_FLOOR = 15.0
CANDIDATES = 4
MODELS = {
    "as drawn": lambda: random_model(GPT2_SMALL_150),
    "opinionated": lambda: opinionated(random_model(GPT2_SMALL_150)),
}


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(model, thresholds: list[float]) -> tuple[float, float, str]:
    """Seconds of the published loop, of ours, and what ours kept."""
    shape = GPT2_SMALL_150
    loop = published(model, shape, statistics.median(thresholds))
    loop.step()
    steps = [seconds(loop.step) for _ in range(CANDIDATES // 2)]
    start = time.perf_counter()
    points = extract(model, shape, thresholds).points
    ours = time.perf_counter() - start
    steps += [seconds(loop.step) for _ in range(CANDIDATES - CANDIDATES // 2)]
    loop.close()
    total = len(thresholds) * shape.layers * (shape.heads + 1) * statistics.median(steps)
    kept = ", ".join(f"{point.kept.heads.sum()}+{point.kept.mlps.sum()}" for point in points)
    return total, ours, f"heads + MLPs kept: {kept}; {sum(len(point.near_ties) for point in points)} near ties"


@pytest.mark.parametrize(("kind", "threshold"), [("as drawn", 1e-3), ("as drawn", 1e-2), ("opinionated", 1e-1)])
def test_one_threshold(kind, threshold, check_floors, report_row):
    theirs, ours, kept = compare(MODELS[kind](), [threshold])
    report_row(
        f"extraction, GPT-2 small {kind}, 150 + 150 prompts of 15 tokens, fp32, threshold {threshold}",
        f"published {theirs:.0f} s (from {CANDIDATES} candidates), ours {ours:.1f} s, {theirs / ours:.1f}x; {kept}",
    )
    if check_floors:
        assert theirs / ours >= SPEED_FLOOR


def test_thirty_thresholds(report_row):
    theirs, ours, kept = compare(MODELS["as drawn"](), list(THRESHOLDS))
    report_row(
        "the same as drawn, 30 thresholds from 1e-5 to 1",
        f"published {theirs:.0f} s (from {CANDIDATES} candidates), ours {ours:.1f} s, {theirs / ours:.1f}x; {kept}",
    )

"""A training step at GPT-2 small shape, ours and the published method's, in one run.

``pytest bench/test_training_step.py --check-floors`` fails unless ours is at least 15 times faster (medians, steps of
the two interleaved) and needs at most a third of the memory (peak resident bytes above the weights, a process each).
"""

import statistics
import subprocess
import sys
import time

from bench.cases.training_step import GPT2_SMALL, STEPS, random_model

SPEED_FLOOR, MEMORY_CEILING = 15.0, 1 / 3
ROUNDS = 3


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def test_speed(benchmark, check_floors, keep, report_row):
    model = random_model(GPT2_SMALL)
    steps = {name: make(model, GPT2_SMALL) for name, make in STEPS.items()}
    for step in steps.values():
        step()
    ours, published = [], []
    for _ in range(ROUNDS):
        published.append(seconds(steps["published"]))
        ours += [seconds(steps["fastcircuit"]) for _ in range(3)]
    benchmark.pedantic(steps["fastcircuit"], rounds=3)
    ratio = statistics.median(published) / statistics.median(ours)
    benchmark.extra_info |= {"published_s": statistics.median(published), "ratio": ratio}
    report_row(
        "training step, GPT-2 small, batch 4 x 64, fp32",
        f"published {statistics.median(published):.2f} s, fastcircuit {statistics.median(ours):.3f} s, {ratio:.1f}x",
    )
    medians = {"published_s": statistics.median(published), "fastcircuit_s": statistics.median(ours), "ratio": ratio}
    keep("training_step", [{name: round(value, 4) for name, value in medians.items()}])
    if check_floors:
        assert ratio >= SPEED_FLOOR


def test_memory(check_floors, keep, report_row):
    peaks = {}
    for name in STEPS:
        done = subprocess.run([sys.executable, "-m", "bench.memory", name], capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout)
    ratio = peaks["fastcircuit"] / peaks["published"]
    report_row(
        "memory of that step above the weights",
        f"published {peaks['published'] / 1e9:.2f} GB, ours {peaks['fastcircuit'] / 1e9:.2f} GB, {ratio:.2f} of it",
    )
    keep("training_step_memory", [{f"{name}_bytes": peak for name, peak in peaks.items()}])
    if check_floors:
        assert ratio <= MEMORY_CEILING

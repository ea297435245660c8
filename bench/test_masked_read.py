"""pytest bench/test_masked_read.py -s [--check-floors]: our masked_read against torch's, interleaved in one run."""

import statistics
import time

import pytest
import torch

from bench.cases import masked_read as case

ROUNDS = 15


def _interleaved(calls):
    """Seconds per call of each variant; taking turns, so that a slow moment of the machine meets all of them."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", case.SHAPES, ids=lambda s: f"R{s.readers}-W{s.writers}")
def test_ratio_to_torch(shape, direction, check_floors, keep):
    with torch.no_grad():
        calls = case.variants(shape, direction)
        results = {name: call() for name, call in calls.items()}
        for name, result in results.items():
            torch.testing.assert_close(result, results["torch.addmm"], atol=5e-3, rtol=1e-3, msg=name)
        times = {name: statistics.median(ts) for name, ts in _interleaved(calls).items()}
    ours, flops, least = times["fastcircuit"], shape.flops(direction), shape.least_bytes(direction, 4)
    print(f"\n{direction} R={shape.readers} W={shape.writers}, {torch.get_num_threads()} threads, p50 of {ROUNDS}:")
    for name, seconds in times.items():
        print(
            f"  {name:14}{seconds * 1e3:8.1f} ms {flops / seconds / 1e9:7.1f} GFLOP/s {least / seconds / 1e9:6.1f} GB/s"
            f"   {seconds / ours:5.2f}x ours"
        )
    print(f"  floor: {flops / 1e9:.2f} GFLOP, {least / 1e6:.0f} MB, {flops / least:.1f} FLOP/byte")
    row = {"direction": direction, "readers": shape.readers, "writers": shape.writers, "tokens": shape.tokens}
    milliseconds = {f"{name}_ms": round(value * 1e3, 3) for name, value in times.items()}
    keep("masked_read", [{**row, **milliseconds, "ratio": round(times["torch.addmm"] / ours, 3)}])
    if check_floors:
        assert times["torch.addmm"] / ours >= case.FLOORS[direction]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", ["fastcircuit", "torch.addmm"])
@pytest.mark.parametrize("shape", [case.Shape(16, 46, 320, 64)], ids=["stories260K"])
def test_small_model(benchmark, shape, variant, direction):
    with torch.no_grad():
        benchmark(case.variants(shape, direction)[variant])

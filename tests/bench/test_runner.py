"""What a run measures: ratios within rounds, parts of a whole, threads, memory; and what is in its rows."""

import functools
import gc
import io
import json
import math
import shutil
import sys

import pytest
import torch

from fastcircuit.benchmarks import SUITES, memory
from fastcircuit.benchmarks.case import Case, Target, Work
from fastcircuit.benchmarks.ceilings import Ceilings
from fastcircuit.benchmarks.memory import peak_bytes
from fastcircuit.benchmarks.registry import load
from fastcircuit.benchmarks.suites import scaling
from fastcircuit.benchmarks.timing import Budget, Clock, Spread, interleave
from fastcircuit.errors import InputError, RunError
from fastcircuit.ops import cpu, extension
from fastcircuit.ops.recycling import LEAST_BYTES, POOL
from tests.bench.toys import BELIEVING, QUICK, claims, measured, toy


def test_rows():
    seen = []
    found = measured(toy(work=Work(8, 16)), on_case=lambda *about: seen.append(about))
    assert seen == [("toy/sleep/small/float32", 0, 1), ("toy/sleep/small/float32", 1, 1)]
    fast, slow = found.rows
    assert (fast.variant, fast.baseline, slow.ratio) == ("fastcircuit", "slow", 1.0)
    assert fast.ratio_low == fast.ratio == fast.ratio_high == pytest.approx(4.0)
    assert fast.p20_ms == fast.p50_ms == fast.p80_ms == pytest.approx(2.0)
    assert (fast.flops, fast.bytes, fast.rounds, fast.threads) == (8, 16, 6, 1)
    assert fast.percent_of_floor == pytest.approx(100 * fast.floor_ms / fast.p50_ms)
    assert fast.device.startswith("cpu ")


def test_parts_count_as_the_whole():
    case = toy(baseline=None)
    case = Case(**{**vars(case), "variants": {"part": lambda _: claims(0.002, parts=50)}})
    (row,) = measured(case).rows
    assert row.parts == 50
    assert row.p50_ms == pytest.approx(100.0)


def test_calls_take_turns_without_collection():
    order = []

    def note(name):
        assert not gc.isenabled()
        order.append(name)

    calls = {name: (lambda name=name: note(name)) for name in "ab"}
    times = interleave(calls, Clock(lambda: None), Budget(0.01, least_rounds=4, most_rounds=4))
    assert gc.isenabled()
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    blocks = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert len(blocks) >= 8


def test_a_very_slow_call_is_timed_once():
    calls = {"slow": [], "fast": []}

    def took(name, seconds):
        calls[name].append(seconds)
        return seconds

    functions = {"slow": lambda: took("slow", 101.0), "fast": lambda: took("fast", 1.0)}
    assert interleave(functions, BELIEVING, Budget(10.0)) == {"slow": [101.0], "fast": [1.0]}
    assert len(calls["slow"]) == 1
    assert len(calls["fast"]) > 2


def test_intervals_hold_the_median_with_95_percent():
    for count in (1, 5, 6, 15, 60):
        spread = Spread.of(list(range(count)))
        assert spread.low <= spread.p50 <= spread.high
        assert spread.p20 <= spread.p50 <= spread.p80
        skipped = int(spread.low)
        outside = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
        assert outside <= 0.05 or skipped == 0
        assert 2 * sum(math.comb(count, k) for k in range(skipped + 2)) / 2**count > 0.05 or count == 1


def test_ceilings_only_rise(monkeypatch):
    rates = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr("fastcircuit.benchmarks.ceilings._stream_rate", lambda device, size: next(rates))
    monkeypatch.setattr("fastcircuit.benchmarks.ceilings._matmul_rate", lambda device, dtype: 7.0)
    monkeypatch.setattr("fastcircuit.benchmarks.ceilings._register_rate", lambda device, dtype: 6.0)
    measured_here = Ceilings("cpu")
    work = Work(flops=14, bytes=30)
    assert measured_here.floor(work, torch.float32) == 10.0
    seen = []
    for _ in range(3):
        measured_here.measure_again(work, torch.float32)
        seen.append(measured_here.floor(work, torch.float32))
    assert seen == [10.0, 10.0, 6.0]
    assert measured_here.floor(Work(flops=140, bytes=30), torch.float32) == 20.0


def test_the_ceiling_is_of_the_machine_and_not_of_one_library(monkeypatch):
    if extension.kernels is None:
        pytest.skip(extension.missing_reason())
    matmul = "fastcircuit.benchmarks.ceilings._matmul_rate"
    monkeypatch.setattr(matmul, lambda device, dtype: 1.0)
    assert Ceilings("cpu").flops_per_second(torch.float32) > 1e8
    monkeypatch.setattr(matmul, lambda device, dtype: 1e20)
    assert Ceilings("cpu").flops_per_second(torch.float32) == 1e20


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_multiply_adds_are_counted_on_every_thread(threads, dtype):
    if extension.kernels is None:
        pytest.skip(extension.missing_reason())
    for name in extension.runnable_isas():
        count = functools.partial(extension.kernels.multiply_adds, extension.ISAS.index(name))
        once = count(1, cpu.CODES[dtype], 1)
        assert count(threads, cpu.CODES[dtype], 10) == 10 * once * (threads if extension.kernels.openmp else 1)
        lanes = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 4 if name in ("avx512_bf16", "amx") else 2}
        assert once == lanes[dtype] * count(1, cpu.CODES[torch.float64], 1)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite(suite, quick):
    cases = load(suite, Target("cpu", quick))
    assert cases
    for case in cases:
        assert case.suite == suite
        assert case.baseline is None or case.baseline in case.variants
        assert case.axis or set(case.ours) <= set(case.variants)
        assert set(case.bounded) <= set(case.variants)


def test_a_suite_that_is_not_there():
    with pytest.raises(InputError, match="no suite 'speed'; suites: ops, step,"):
        load("speed", QUICK)


def test_peak_memory_is_that_of_the_variant(monkeypatch):
    case = next(case for case in load("scaling", QUICK) if case.axis == "tokens" and case.counts_memory)
    few, many = (
        peak_bytes(case, name, QUICK, 1) for name in (min(case.variants, key=int), max(case.variants, key=int))
    )
    assert 0 < few < many
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match="the peak memory of 1 could not be measured: exit code 1"):
        peak_bytes(case, "1", QUICK, 1)


def test_memory_that_setup_has_freed_is_counted_again(monkeypatch, capsys):
    """What the pool holds when a variant begins would be resident before it, and be used by it."""
    held = []
    case = toy(setup=lambda: POOL.empty((2 * LEAST_BYTES,), torch.empty(0)).fill_(1.0).sum())
    monkeypatch.setattr("fastcircuit.benchmarks.registry.load", lambda suite, target: [case])
    monkeypatch.setattr(memory, "_status", lambda field: held.append(POOL.num_bytes) or 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    request = {"suite": "toy", "key": case.key, "variant": "slow", "quick": True, "threads": 1}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    memory.main()
    assert held == [0, 0]
    assert capsys.readouterr().out == "0\n"


@pytest.mark.parametrize("suite", ["attribution", "extraction", "inference", "serving"])
def test_memory_is_counted_in_full_runs(suite):
    cases = load(suite, Target("cpu"))
    assert all(case.counts_memory for case in cases if not case.shape.endswith(" thresholds"))
    assert not any(case.counts_memory for case in load(suite, QUICK))


def test_the_peak_of_setup_is_not_the_variants(monkeypatch, capsys):
    """A setup that took 200 MB and freed them leaves no trace in what a variant of no size needs."""
    case = toy(setup=lambda: torch.ones(50_000_000).sum())
    monkeypatch.setattr("fastcircuit.benchmarks.registry.load", lambda suite, target: [case])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    request = {"suite": "toy", "key": case.key, "variant": "slow", "quick": True, "threads": 1}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    memory.main()
    assert int(capsys.readouterr().out) < 50e6


def test_the_memory_of_a_compiler_is_not_a_variants(monkeypatch):
    monkeypatch.setattr("fastcircuit.benchmarks.runner.peak_bytes", lambda case, name, target, threads: 7)
    fast, slow = measured(toy(counts_memory=True, no_memory=("slow",))).rows
    assert (fast.peak_bytes, slow.peak_bytes) == (7, None)


def test_sparse_points_skip_what_is_off():
    """The curve against sparsity is one of steps that sample so many zeros."""
    case = next(case for case in load("scaling", QUICK) if case.axis == "sparsity")
    operands = case.setup()
    run = scaling.step.edge_pruning(operands)
    scaling._turn_off(run, 0.8)
    masks = run.parameters.sample(run.parameters.draw(0, torch.Generator().manual_seed(0)))
    assert (masks.edge == 0).float().mean() == pytest.approx(0.8, abs=0.01)
    assert case.variants["0.8"](operands).check() is None

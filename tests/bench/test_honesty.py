"""The benchmarks catch what would make their numbers wrong: kernels, clocks that do not wait, impossible ratios."""

import dataclasses
import functools
import threading
import time

import pytest
import torch

from fastcircuit.benchmarks.case import Variant, Work
from fastcircuit.benchmarks.models import Shape
from fastcircuit.benchmarks.suites import ops, scaling, step
from fastcircuit.benchmarks.suites.attribution import Stories
from fastcircuit.benchmarks.timing import Clock
from fastcircuit.discovery.static_step import StaticStep
from fastcircuit.errors import RunError
from fastcircuit.graph import Graph
from fastcircuit.ops import masked_read, masked_read_backward_
from tests.bench.toys import QUICK, claims, measured, toy

SHAPE = ops.Shape(5, 7, 6, 11)
REAL = Clock(lambda: None)


def without_last_writer(x):
    mask = x.mask.clone()
    mask[:, -1] = 0
    return lambda: masked_read(x.stream, mask, x.base)


def without_base(x):
    return lambda: masked_read(x.stream, x.mask)


def one_number_off(x):
    def call():
        reads = masked_read(x.stream, x.mask, x.base)
        reads[-1, -1, -1] *= 1.01
        return reads

    return call


def not_a_number(x):
    return lambda: masked_read(x.stream, x.mask, x.base).fill_(torch.nan)


def overwrites_gradients(x):
    def call():
        return masked_read_backward_(x.grad_reads, x.stream, x.mask, None)

    return call


def swaps_mask_gradients(x):
    return lambda: masked_read_backward_(x.grad_reads, x.stream, x.mask, x.grad_stream).flip(0)


WRONG = {
    "forward": (without_last_writer, without_base, one_number_off, not_a_number),
    "backward": (overwrites_gradients, swaps_mask_gradients),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("direction", "make"), [(key, make) for key, makes in WRONG.items() for make in makes])
def test_a_wrong_kernel_is_red_and_has_no_number(direction, make, dtype):
    case = ops.read_case("toy", SHAPE, direction, dtype, QUICK)
    right = measured(case, timer=REAL)
    assert right.problems == []
    assert {row.variant for row in right.rows} == {"fastcircuit", "torch.addmm"}
    case = dataclasses.replace(case, variants={**case.variants, "wrong": functools.partial(ops.variant, make)})
    found = measured(case, timer=REAL)
    assert found.rows == []
    assert len(found.problems) == 1
    assert "wrong: " in found.problems[0]
    assert "numbers are off" in found.problems[0]


class Later:
    """A result that is there when its thread has ended, as of a device that works on its own."""

    def __init__(self, seconds):
        self.thread = threading.Thread(target=time.sleep, args=(seconds,))
        self.thread.start()

    def cpu(self):
        self.thread.join()


def test_a_clock_that_does_not_wait_is_caught():
    case = toy(baseline=None)
    case = dataclasses.replace(case, variants={"fastcircuit": lambda _: Variant(lambda: Later(0.03), lambda: None)})
    found = measured(case, timer=REAL)
    assert found.rows == []
    assert "the device was not synchronised" in found.problems[0]


def test_a_clock_that_waits_is_believed():
    running = []

    def call():
        running.append(Later(0.03))
        return running[-1]

    clock = Clock(lambda: [later.thread.join() for later in running])
    clock.check(call)
    assert clock.seconds(call) >= 0.03
    with pytest.raises(RunError, match="was not synchronised"):
        REAL.check(call)


def test_a_ratio_above_its_bound_fails():
    bounded = functools.partial(toy, bounded=("fastcircuit",))
    assert measured(bounded(bound=lambda _: 100.0)).problems == []
    found = measured(bounded(bound=lambda _: 1.5))
    assert found.rows == []
    assert "the work left allows 1.5" in found.problems[0]


def test_a_time_below_the_floor_fails():
    assert measured(toy(work=Work(1, 1))).problems == []
    found = measured(toy(work=Work(flops=10**15, bytes=1)))
    assert found.rows == []
    assert "less than its work takes at full speed" in found.problems[0]


def test_one_red_case_does_not_hide_the_others():
    found = measured(toy("bad", wrong="it is wrong"), toy("good"))
    assert {row.name for row in found.rows} == {"good"}
    assert found.problems == ["toy/bad/small/float32: fastcircuit: it is wrong"]


@pytest.mark.parametrize(
    "error", [RuntimeError("not enough memory: you tried\nmore"), MemoryError(), RunError("stopped")]
)
def test_a_case_that_fails_says_so_and_the_others_go_on(error):
    def fails(state):
        raise error

    bad = dataclasses.replace(toy("bad", baseline=None), variants={"fastcircuit": fails})
    found = measured(bad, toy("good"))
    assert {row.name for row in found.rows} == {"good"}
    (problem,) = found.problems
    assert problem.startswith("toy/bad/small/float32: ")
    assert problem.endswith(("RuntimeError: not enough memory: you tried", "MemoryError", ": stopped"))
    assert set(found.seconds) == {"toy"}


def test_variants_are_closed_whatever_happens():
    closed = []
    close = functools.partial(closed.append, True)
    for wrong in (None, "it is wrong"):
        case = dataclasses.replace(
            toy(baseline=None), variants={"fastcircuit": lambda _, wrong=wrong: claims(0.001, wrong, close=close)}
        )
        measured(case)
    assert closed == [True, True]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_step_with_wrong_masks_or_gradients_is_red(architecture):
    operands = step.Operands(Shape(2, 4, 32, 101, 2, 9, architecture, kv_heads=2), "cpu")
    for make in (step.fastcircuit_step, step.plain_step, step.published_step):
        assert make(operands).check() is None
    cheaper = step.Operands(operands.shape, "cpu", published_truth=False)
    for truth, same in zip(operands.truth, cheaper.truth, strict=True):
        torch.testing.assert_close(truth, same, atol=1e-8, rtol=1e-6)
    divergence = step.our_divergence(step.edge_pruning(operands))
    assert "numbers are off" in operands.check(lambda edge, node: divergence(edge * 0.999, node))
    assert "numbers are off" in operands.check(lambda edge, node: divergence(edge, node) * 1.001)


@pytest.mark.parametrize("what", ["gradient", "kl"])
def test_a_wrong_fixed_step_is_red(what, monkeypatch):
    """A run that steps on fixed shapes, as on a GPU, is gated by those steps."""
    operands = step.Operands(Shape(2, 4, 32, 101, 2, 9), "cpu")
    assert step.fastcircuit_step(operands, step="fixed").check() is None
    right = StaticStep.accumulate

    def wrong(self, inputs):
        right(self, inputs)
        getattr(self, what).mul_(1.01)

    monkeypatch.setattr(StaticStep, "accumulate", wrong)
    assert "numbers are off" in step.fastcircuit_step(operands, step="fixed").check()
    assert step.fastcircuit_step(operands, step="dynamic").check() is None


def test_a_step_that_skips_what_is_on_is_red(monkeypatch):
    """A sparse point is gated at masks with zeros: those are what it skips by."""
    operands = scaling._opinionated(Shape(4, 8, 64, 101, 2, 9), "cpu")
    assert scaling._sparse_point(0.8, operands).check() is None
    live = Graph.live
    monkeypatch.setattr(Graph, "live", lambda self, on: live(self, on if on.all() else on & (on.cumsum() % 2 == 0)))
    assert step.fastcircuit_step(operands).check() is None
    assert "numbers are off" in scaling._sparse_point(0.8, operands).check()


def test_a_wrong_full_pass_is_red(monkeypatch):
    stories = Stories(0.01, "cpu")
    passes = stories.full_pass(), stories.published_full_pass()
    assert [variant.check() for variant in passes] == [None, None]
    right = stories.kl
    monkeypatch.setattr(stories, "kl", lambda keep: right(keep) * 1.01)
    assert all("the published form's" in variant.check() for variant in passes)

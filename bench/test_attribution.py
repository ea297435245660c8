"""EAP and EAP-IG at GPT-2 small shape beside the published method; ACDC beside one full forward pass per edge.

``pytest bench/test_attribution.py --check-floors`` fails unless ours are at least 3 times faster (medians, calls of the
two interleaved) with at most half the memory (peak resident bytes above the weights, a process each), and ACDC is at
least 20 times faster than a masked forward pass over everything for every edge. That is timed for a few edges only.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from bench.cases import attribution as case
from bench.cases.extraction import opinionated
from bench.cases.training_step import random_model
from fastcircuit.discovery.acdc import acdc
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks import load_task

SPEED_FLOOR, MEMORY_CEILING, ACDC_FLOOR = 3.0, 0.5, 20.0
ROUNDS, FORWARDS = 5, 5


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("method", case.METHODS)
def test_speed(method, check_floors, keep, report_row):
    model = random_model(case.SHAPE)
    calls = {
        name: make(model, case.SHAPE, method) for name, make in (("ours", case.ours), ("published", case.published))
    }
    times = {name: [seconds(call)] for name, call in calls.items()}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    ours, published = (statistics.median(times[name][1:]) for name in ("ours", "published"))
    report_row(
        f"{method}, GPT-2 small, 8 x 16 tokens, fp32",
        f"published {published:.2f} s, ours {ours:.3f} s, {published / ours:.1f}x",
    )
    keep("attribution", [{"method": method, "published_s": round(published, 4), "ours_s": round(ours, 4)}])
    if check_floors:
        assert published / ours >= SPEED_FLOOR


@pytest.mark.parametrize("method", case.METHODS)
def test_memory(method, check_floors, keep, report_row):
    peaks = {}
    for name in ("ours", "published"):
        command = [sys.executable, "-m", "bench.memory", f"{method}-{name}"]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ratio = peaks["ours"] / peaks["published"]
    report_row(
        f"memory of {method} above the weights",
        f"published {peaks['published'] / 1e6:.0f} MB, ours {peaks['ours'] / 1e6:.0f} MB, {ratio:.2f} of it",
    )
    keep("attribution_memory", [{"method": method, **{f"{name}_bytes": peak for name, peak in peaks.items()}}])
    if check_floors:
        assert ratio <= MEMORY_CEILING


def stories() -> Reference:
    task = load_task("pronoun-212", load_tokenizer("stories260K"))
    return Reference(load_model("stories260K"), task.split("train"))


def gpt2_small() -> Reference:
    model = MaskedCausalLM(opinionated(random_model(case.SHAPE)))
    return Reference(model, case.task_of(case.SHAPE).split("train"))


@pytest.mark.parametrize(("make", "share"), [(stories, 0.01), (gpt2_small, 0.003)])
def test_acdc(make, share, check_floors, keep, report_row):
    """The threshold is ``share`` of the KL of the empty circuit."""
    reference = make()
    edges = reference.model.graph.num_edges
    batches = list(reference.batches(256))
    nothing, everything = Masks(torch.zeros(edges)), Masks(torch.ones(edges))
    threshold = share * mean_kl(reference, nothing, batches)
    forwards = [seconds(lambda: mean_kl(reference, everything, batches)) for _ in range(FORWARDS)]
    start = time.perf_counter()
    found = acdc(reference, threshold)
    ours = time.perf_counter() - start
    forwards += [seconds(lambda: mean_kl(reference, everything, batches)) for _ in range(FORWARDS)]
    full = edges * statistics.median(forwards)
    report_row(
        f"ACDC, {make.__name__}, {len(reference)} examples, threshold {threshold:.4f}",
        f"{edges} full passes {full:.0f} s (from {2 * FORWARDS}), ours {ours:.1f} s, {full / ours:.1f}x; "
        f"{found.keep.sum()} edges kept",
    )
    keep("acdc", [{"model": make.__name__, "full_s": round(full, 2), "ours_s": round(ours, 3)}])
    if check_floors:
        assert full / ours >= ACDC_FLOOR

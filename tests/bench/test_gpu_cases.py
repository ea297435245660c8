"""What is measured on a GPU runs, in small, on the CPU: the same functions on another device."""

import subprocess
from pathlib import Path

import pytest
import torch

from bench.cases import gpu as case
from bench.gpu_about import gpu_about
from fastcircuit.benchmarks.models import Shape
from fastcircuit.discovery.execution import Execution
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM

ROOT = Path(__file__).parents[2]
SMALL = Shape(layers=2, heads=2, width=16, vocabulary=40, batch=3, tokens=6)
SMALL_LLAMA = case.LlamaShape(layers=2, heads=2, width=16, mlp=24, vocabulary=40)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_plain_torch_computes_what_we_compute(architecture):
    if architecture == "gpt2":
        hf_model = case.gpt2_on(SMALL, "cpu", torch.float64)
    else:
        hf_model = case.random_llama(SMALL_LLAMA, "cpu", torch.float64)
    run = case.run_of(MaskedCausalLM(hf_model), SMALL, Execution("dynamic"))
    batch, size = run.reference.batch(torch.arange(3)), run.model.graph.num_edges
    mask = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = run.stepper.divergence(Masks(mask), batch)
    arguments = (batch.token_ids.view(3, -1), batch.ablated, batch.answers.tokens, batch.answers.log_probs)
    plain = case.plain_kl(run.model)(mask, *arguments)
    torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss, mask)[0] for loss in (plain, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_every_step_that_is_timed_runs():
    model, llama = (
        case.gpt2_on(SMALL, "cpu", torch.float32),
        MaskedCausalLM(case.random_llama(SMALL_LLAMA, "cpu", torch.bfloat16)),
    )
    makers = [
        lambda: case.fastcircuit_step(model, SMALL, "dynamic"),
        lambda: case.fastcircuit_step(model, SMALL, "fixed"),
        lambda: case.plain_step(model, SMALL, compiled=False),
        lambda: case.published_step(model, SMALL, "cpu"),
        lambda: case.large_step(llama, 4, 6, 2),
    ]
    for make in makers:
        found = case.measured(make, "cpu", repeats=1, warm_up=1)
        assert found["ms"] > 0
        assert found["peak_bytes"] is None


@pytest.mark.parametrize("by_column", [True, False])
def test_products_that_are_timed_are_products(by_column):
    timed = []
    shape = case.ProductShape(3, 6, 8, 5, by_column)
    rows = case.product_times(shape, torch.float32, "cpu", lambda call: timed.append(call()) or 1.0)
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all(row[f"{name}_ms"] == 1.0 for row in rows for name in ("torch", "all", "half", "none"))
    assert len(timed) == 8
    assert shape.flops_per_byte == pytest.approx(6 * 8 * 5 / (6 * 8 + 8 * 5 + 6 * 5))


def test_ceilings_sparsities_and_a_whole_run():
    assert min(case.ceilings("cpu", 64, repeats=1).values()) > 0
    model = case.gpt2_on(SMALL, "cpu", torch.float32)
    rows = case.step_at_sparsities(model, SMALL, "cpu", [10.0, -4.0], repeats=1)
    assert rows[0]["sparsity"] < 0.01 < 0.9 < rows[1]["sparsity"]
    found, seconds, reports = case.whole_run(model, SMALL, pairs=5, steps=12)
    assert reports[-1].step == 11
    assert seconds > 0
    assert found.circuit.sparsity == pytest.approx(0.95, abs=0.02)


def test_rows_say_where_they_come_from():
    assert set(gpu_about()) == {"device", "driver", "cuda", "triton"}


def test_what_a_gpu_measures_is_kept():
    commands = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    measuring = [line for line in commands.splitlines() if "pytest" in line or "fastcircuit bench" in line]
    assert [line.split(" ", 1)[1] for line in measuring] == [
        "-m pytest -q -m gpu bench --record",
        "bench --device cuda --quick --results bench/results",
    ]

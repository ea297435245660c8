"""Training steps and a whole run on a CUDA device: ours beside the published method, plain torch and torch.compile.

``pytest -m gpu bench --record`` appends rows to bench/results/gpu_*.csv; ``--check-floors`` fails on a missed target.
"""

import functools

import pytest
import torch

from bench.cases import gpu as case
from bench.gpu_about import gpu_about
from fastcircuit.models.masked import MaskedCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CUDA = "cuda"
STEP_CEILING_MS, SPEED_FLOOR, MEMORY_CEILING, MEMORY_RATIO = 15.0, 60.0, 2.5e9, 15.0
RUN_CEILING_S = 45.0
PUBLISHED_GPU_HOURS = 32 * 35


@pytest.fixture(autouse=True)
def empty_device():
    """Every benchmark starts with nothing cached, and leaves the precision of products as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.cuda.empty_cache()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.compiler.reset()
    torch.cuda.empty_cache()


def test_a_ceilings(keep, report_row):
    found = case.ceilings(CUDA, 16384)
    report_row(
        "ceilings", f"{found['copy_gb_per_s']:.0f} GB/s copied, {found['bf16_tflop_per_s']:.0f} TFLOP/s bfloat16"
    )
    keep("gpu_ceilings", [{**rounded(found), **gpu_about()}])


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_b_step_of_gpt2_small(precision, keep, report_row, check_floors):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = case.gpt2_on(case.GPT2_SMALL_32, CUDA, dtype)
    weights, shape = torch.cuda.memory_allocated(), case.GPT2_SMALL_32
    makers = {
        "fastcircuit dynamic": (lambda: case.fastcircuit_step(model, shape, "dynamic"), 20),
        "fastcircuit fixed": (lambda: case.fastcircuit_step(model, shape, "fixed"), 20),
        "fastcircuit graph": (lambda: case.fastcircuit_step(model, shape, "graph"), 50),
        "plain torch": (lambda: case.plain_step(model, shape, compiled=False), 10),
        "published": (lambda: case.published_step(model, shape, CUDA), 3),
    }
    if precision == "bfloat16":  # compiling takes a minute or more
        makers["plain torch, compiled"] = (lambda: case.plain_step(model, shape, compiled=True), 10)
    rows = {
        name: {"step": name, **case.measured(make, CUDA, repeats, weights)} for name, (make, repeats) in makers.items()
    }
    ours, published = rows["fastcircuit graph"], rows["published"]
    for name, row in rows.items():
        report_row(f"step, GPT-2 small, 32 x 64, {precision}: {name}", f"{row['ms']:.2f} ms, {row['peak_bytes']:.3g} B")
    keep("gpu_step", [{"precision": precision, **rounded(row), **gpu_about()} for row in rows.values()])
    if check_floors:
        assert ours["ms"] <= STEP_CEILING_MS
        assert published["ms"] >= SPEED_FLOOR * ours["ms"]
        assert ours["peak_bytes"] <= MEMORY_CEILING
        assert published["peak_bytes"] >= MEMORY_RATIO * ours["peak_bytes"]


def test_c_step_time_falls_with_sparsity(keep, report_row, check_floors):
    model = case.gpt2_on(case.GPT2_SMALL_32, CUDA, torch.bfloat16)
    log_alphas, by_choice = [10.0, 2.0, 0.0, -2.0, -4.0, -6.0], {}
    for products, gated in (("where it pays", None), ("always", True), ("never", False)):
        rows = case.step_at_sparsities(model, case.GPT2_SMALL_32, CUDA, log_alphas, 20, gated)
        by_choice[products] = rows
        for row in rows:
            report_row(
                f"step at sparsity {row['sparsity']:.3f}, GPT-2 small, 32 x 64, dead products left out {products}",
                f"{row['step_ms']:.2f} ms",
            )
        keep("gpu_sparsity", [{"products_left_out": products, **rounded(row), **gpu_about()} for row in rows])
    if check_floors:
        rows = by_choice["where it pays"]
        assert rows[-1]["step_ms"] < rows[0]["step_ms"]


def test_d_whole_run(keep, report_row, check_floors):
    model = case.gpt2_on(case.GPT2_SMALL_32, CUDA, torch.bfloat16)
    found, seconds, reports = case.whole_run(model, case.GPT2_SMALL_32, 200, 3000)
    assert reports[-1].step == 2999
    report_row("3000 steps, GPT-2 small shape, 200 pairs of IOI's shape", f"{seconds:.1f} s, everything included")
    keep("gpu_run", [{"steps": 3000, "seconds": round(seconds, 2), "edges": found.circuit.num_edges, **gpu_about()}])
    if check_floors:
        assert seconds <= RUN_CEILING_S


def test_e_step_of_codellama_13b(keep, report_row):
    hf_model = case.random_llama(case.CODELLAMA_13B, CUDA, torch.bfloat16)
    weights, masked = torch.cuda.memory_allocated(), MaskedCausalLM(hf_model, "none")
    rows = []
    for batch, micro_batch, repeats in ((1, 1, 10), (4, 4, 5), (32, 4, 3)):
        found = case.measured(
            functools.partial(case.large_step, masked, batch, 64, micro_batch),
            CUDA,
            repeats,
            weights,
        )
        hours = 6000 * found["ms"] / 3.6e6
        rows.append({"batch": batch, "micro_batch": micro_batch, **found, "hours_6000": hours})
        report_row(
            f"step, CodeLlama-13B shape, {batch} x 64 tokens, bfloat16",
            f"{found['ms']:.0f} ms, {found['peak_bytes'] / 1e9:.1f} GB above the weights; 6000 steps {hours:.1f} h "
            f"(published: {PUBLISHED_GPU_HOURS} GPU hours)",
        )
    keep("gpu_13b", [{**rounded(row), **gpu_about()} for row in rows])


def rounded(row):
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}

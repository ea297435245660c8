"""masked_read, attention and products of live groups on a CUDA device: the Triton kernels beside what torch has.

Medians of device time.
"""

import pytest
import torch

from bench.cases import gpu
from bench.gpu_about import gpu_about
from fastcircuit.benchmarks.suites import ops as case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("writers", [26, 79, 157])
def test_forward_and_backward(writers, report_row):
    from triton.testing import do_bench

    from fastcircuit.ops import masked_read, masked_read_backward_

    shape = case.Shape(36, writers, 2048, 768)
    stream, grad = (torch.randn(n, 2048, 768, device="cuda") for n in (writers, 36))
    mask, base = torch.rand(36, writers, device="cuda"), torch.randn(2048, 768, device="cuda")
    grad_stream = torch.zeros_like(stream)
    forward = {
        "triton": lambda: masked_read(stream, mask, base, backend="triton"),
        "addmm": lambda: torch.addmm(base.flatten().expand(36, -1), mask, stream.flatten(1)),
    }
    backward = {
        "triton": lambda: masked_read_backward_(grad, stream, mask, grad_stream, backend="triton"),
        "addmm": lambda: (
            grad_stream.flatten(1).addmm_(mask.T, grad.flatten(1)),
            grad.flatten(1) @ stream.flatten(1).T,
        ),
    }
    for direction, calls in (("forward", forward), ("backward", backward)):
        times = {name: do_bench(call, return_mode="median") for name, call in calls.items()}
        report_row(
            f"masked_read {direction}, 36 readers, {writers} writers, 2048 tokens, float32, CUDA",
            f"triton {times['triton']:.3f} ms ({shape.flops(direction) / times['triton'] / 1e9:.1f} TFLOP/s), "
            f"addmm {times['addmm']:.3f} ms",
        )


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_attention(tokens, report_row):
    """Up to which length packed attention is to be taken (SHORT in fastcircuit/models/packing.py)."""
    from triton.testing import do_bench

    from fastcircuit.ops import packed_attention

    rows, heads, width = 2048 // tokens, 12, 64
    query, key, value = (
        torch.randn(heads, 2048, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    grad, starts = query.new_ones(2048, heads * width), torch.arange(rows + 1, device="cuda") * tokens
    few = (torch.arange(heads, device="cuda") % 4 == 0).int()

    def packed(alive=None):
        return packed_attention(query, key, value, starts, scale=0.125, longest=tokens, alive=alive, backend="triton")

    def padded():
        laid_out = (part.unflatten(1, (rows, tokens)).transpose(0, 1) for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*laid_out, is_causal=True, scale=0.125)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    torch.testing.assert_close(packed(), padded(), rtol=2e-2, atol=2e-2)
    calls = {"packed": packed, "packed, a quarter of the heads": lambda: packed(few), "padded, torch": padded}
    times = {
        name: do_bench(lambda call=call: torch.autograd.grad(call(), (query, key, value), grad), return_mode="median")
        for name, call in calls.items()
    }
    report_row(
        f"attention forward and backward, {rows} x {tokens} tokens, 12 heads of 64, bfloat16, CUDA",
        ", ".join(f"{name} {time:.3f} ms" for name, time in times.items()),
    )


@pytest.mark.parametrize("name", gpu.PRODUCTS)
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_products_of_live_groups(name, precision, keep, report_row):
    """Which products ask who is alive (``pays`` in fastcircuit/ops/live_product.py)."""
    from triton.testing import do_bench

    shape, dtype = gpu.PRODUCTS[name], torch.bfloat16 if precision == "bfloat16" else torch.float32
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        rows = gpu.product_times(shape, dtype, "cuda", lambda call: do_bench(call, return_mode="median"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for row in rows:
        report_row(
            f"product, {name}, {precision}, {row['direction']}",
            f"torch {row['torch_ms']:.4f} ms; asking, with all, half, none alive: {row['all_ms']:.4f}, "
            f"{row['half_ms']:.4f}, {row['none_ms']:.4f} ms; it {'is' if row['pays'] else 'is not'} taken",
        )
    keep("gpu_products", [{"product": name, "precision": precision, **row, **gpu_about()} for row in rows])

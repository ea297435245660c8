"""masked_read on a CUDA device: the Triton kernels beside the torch.addmm form, medians of device time."""

import pytest
import torch

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

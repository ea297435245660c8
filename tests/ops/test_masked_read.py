"""masked_read and its in-place backward: every backend and instruction set against float64."""

import numpy as np
import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import masked_read, masked_read_backward_, reference

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SHAPES = [
    (1, 1, 1, 1),
    (36, 26, 7, 96),
    (5, 13, 11, 17),
    (16, 46, 3, 64),
    (1, 30, 13, 64),
    (37, 19, 50, 31),
    (200, 7, 3, 5),
    (0, 3, 2, 2),
    (3, 0, 2, 2),
    (7, 7, 0, 3),
    (7, 7, 3, 0),
]


def _operands(shape, dtype, mask_dtype):
    readers, writers, tokens, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    stream = draw(writers, tokens, width).to(dtype)
    mask = torch.rand(readers, writers, generator=generator, dtype=torch.float64).to(mask_dtype)
    return stream, mask, draw(tokens, width).to(dtype), draw(readers, tokens, width).to(dtype)


def _exact(tensor):
    """The values in numpy's long double, in which float64 can be judged too."""
    return tensor.double().flatten(1).numpy().astype(np.longdouble)


def _assert_as_good_as_torch(ours, plain, exact):
    """Error against the exact values at most twice that of plain torch in the same dtype, plus one rounding step."""
    assert not ours.isnan().any()
    if ours.numel() == 0:
        return
    step = torch.finfo(ours.dtype).eps * np.abs(exact).max()
    assert np.abs(_exact(ours) - exact).max() <= 2 * np.abs(_exact(plain) - exact).max() + step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_forward(backend, shape, dtype, mask_dtype, with_base):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels have no float16")
    stream, mask, base, _ = _operands(shape, dtype, mask_dtype)
    exact = _exact(mask) @ _exact(stream)
    if with_base:
        exact = exact + _exact(base[None])
    ours = masked_read(stream, mask, base if with_base else None, backend=backend)
    plain = reference.masked_read(stream, mask, base if with_base else None)
    assert ours.dtype == dtype
    assert ours.shape == plain.shape
    assert ours.is_contiguous()
    _assert_as_good_as_torch(ours, plain, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", ["as stream", "float32", None])
def test_backward(backend, shape, dtype, mask_dtype, grad_dtype):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels have no float16")
    stream, mask, _, grad_reads = _operands(shape, dtype, mask_dtype)
    ours = plain = None
    if grad_dtype:
        wider = grad_dtype == "float32" and dtype != torch.float64
        ours = torch.randn(stream.shape).to(torch.float32 if wider else dtype)
        plain = ours.clone()
        exact = _exact(ours) + _exact(mask).T @ _exact(grad_reads)
    ours_mask = masked_read_backward_(grad_reads, stream, mask, ours, backend=backend)
    plain_mask = reference.masked_read_backward_(grad_reads, stream, mask, plain, True)
    assert ours_mask.dtype == mask_dtype
    _assert_as_good_as_torch(ours_mask, plain_mask, _exact(grad_reads) @ _exact(stream).T)
    if grad_dtype:
        _assert_as_good_as_torch(ours, plain, exact)
    assert masked_read_backward_(grad_reads, stream, mask, None, needs_mask_grad=False, backend=backend) is None


@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(backend, with_base):
    stream, mask, base, _ = _operands((5, 4, 3, 7), torch.float64, torch.float64)
    inputs = [t.requires_grad_() for t in ((stream, mask, base) if with_base else (stream, mask))]
    assert torch.autograd.gradcheck(lambda *ts: masked_read(*ts, backend=backend), inputs)


def test_unknown_backend_lists_the_accepted_ones():
    with pytest.raises(InputError, match="accepted are auto, reference"):
        masked_read(torch.ones(1, 1, 1), torch.ones(1, 1), backend="gpu")

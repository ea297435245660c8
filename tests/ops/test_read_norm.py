"""read_norm and its gradient: every backend, fused and not, against float64."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import live_writers, masked_read_backward_, read_norm, read_norm_grad, reference

EPS = 1e-5
# readers, writers, tokens, width
SHAPES = [(1, 1, 1, 1), (5, 13, 3, 200), (17, 40, 2, 33), (0, 3, 2, 2), (3, 2, 0, 5)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.fixture(autouse=True)
def _not_on_the_cpu_kernels(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cpu":
        pytest.skip("there is no C++ kernel for it")


@pytest.fixture(params=[True, False], ids=["fused", "apart"])
def fused(request, backend, monkeypatch):
    """Both ways the Triton launcher can take, whatever it would choose for shapes this small."""
    if backend != "triton":
        if not request.param:
            pytest.skip("it has one way")
        return
    from fastcircuit_kernels import read_norm as kernels

    monkeypatch.setattr(kernels, "LEAST_PROGRAMS", 0 if request.param else 2**60)


def _operands(shape, dtype, mask_dtype):
    readers, writers, tokens, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    mask = torch.rand(readers, writers, generator=generator, dtype=torch.float64).to(mask_dtype)
    stream, base = draw(writers, tokens, width), draw(tokens, width) + 3
    return (stream, mask, base, draw(width), draw(width)), draw(readers, tokens, width)


def _check_close(ours, plain, exact):
    """Error against float64 at most twice that of plain torch in the same dtype, plus a rounding step."""
    assert ours.dtype == plain.dtype
    assert not ours.isnan().any()
    if ours.numel():
        # Two roundings: of the read and of the result. float64 has only itself, with its own roundings, as a judge.
        steps = 16 if ours.dtype == torch.float64 else 2
        step = steps * torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_norm_and_gradient_of_the_reads(backend, fused, shape, dtype, mask_dtype, centered):
    (stream, mask, base, weight, bias), grad = _operands(shape, dtype, mask_dtype)
    operands = (stream, mask, base, weight, bias if centered else None)
    ours = read_norm(*operands, EPS, centered=centered, backend=backend)
    plain = reference.read_norm(*operands, EPS, centered)
    exact = reference.read_norm(*(None if t is None else t.double() for t in operands), EPS, centered)
    for found, close, expected in zip(ours, plain, exact, strict=True):
        _check_close(found, close, expected)
    ours_grad = read_norm_grad(grad, ours[1], *operands[:4], centered=centered, backend=backend)
    plain_grad = reference.read_norm_grad(grad, plain[1], *operands[:4], centered)
    exact_grad = reference.read_norm_grad(grad.double(), exact[1], *(t.double() for t in operands[:4]), centered)
    _check_close(ours_grad, plain_grad, exact_grad)


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(backend, centered, with_base):
    (stream, mask, base, weight, bias), _ = _operands((2, 3, 1, 4), torch.float64, torch.float64)
    bias = bias if centered else None
    leaves = [t.requires_grad_() for t in ((stream, mask, base) if with_base else (stream, mask))]
    run = lambda s, m, b=None: read_norm(s, m, b, weight, bias, EPS, centered=centered, backend=backend)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("plain", [1, 5])
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_plain_reads_are_left_as_they_are(backend, fused, plain, centered):
    (stream, mask, base, weight, bias), grad = _operands((5, 13, 3, 50), torch.float32, torch.float32)
    operands, bias = (stream, mask, base, weight), bias if centered else None
    whole, of_whole = read_norm(*operands, bias, EPS, centered=centered, backend=backend)
    y, stats = read_norm(*operands, bias, EPS, centered=centered, plain=plain, backend=backend)
    assert torch.equal(y[: 5 - plain], whole[: 5 - plain])
    assert torch.equal(stats[:, : 5 - plain], of_whole[:, : 5 - plain])
    torch.testing.assert_close(y[5 - plain :], reference.masked_read(stream, mask, base)[5 - plain :])
    of_reads = read_norm_grad(grad, of_whole, *operands, centered=centered, backend=backend)
    ours = read_norm_grad(grad, stats, *operands, centered=centered, plain=plain, backend=backend)
    assert torch.equal(ours[: 5 - plain], of_reads[: 5 - plain])
    assert torch.equal(ours[5 - plain :], grad[5 - plain :])
    leaves = [t.clone().requires_grad_() for t in (stream, mask, base)]
    by_autograd = torch.autograd.grad(
        read_norm(*leaves, weight, bias, EPS, centered=centered, plain=plain, backend=backend)[0], leaves, grad
    )
    torch.testing.assert_close(by_autograd[2], ours.sum(0))


def test_rows_that_are_not_live_are_not_read(backend, fused):
    (stream, mask, base, weight, bias), grad = _operands((5, 40, 2, 50), torch.float32, torch.float32)
    mask[:, ::2] = 0
    mask[:, 1::6] = 1
    live = live_writers(mask, backend=backend)
    expected = read_norm(stream, mask, base, weight, bias, EPS, centered=True)
    expected_grad = read_norm_grad(grad, expected[1], stream, mask, base, weight, centered=True)
    stream[::2] = torch.nan
    ours = read_norm(stream, mask, base, weight, bias, EPS, centered=True, live=live, backend=backend)
    torch.testing.assert_close(ours, expected)
    ours_grad = read_norm_grad(grad, ours[1], stream, mask, base, weight, centered=True, live=live, backend=backend)
    torch.testing.assert_close(ours_grad, expected_grad)


@pytest.mark.parametrize("centered", [True, False])
def test_readers_that_are_not_wanted_might_not_be_there(backend, fused, centered):
    (stream, mask, base, weight, bias), grad = _operands((20, 7, 2, 50), torch.float32, torch.float32)
    bias, wanted = bias if centered else None, (torch.arange(20) % 3 == 1).int()
    kept = wanted != 0
    mask[~kept], grad[~kept] = torch.nan, torch.nan
    live, few = live_writers(mask, wanted, backend=backend), live_writers(mask[kept], backend=backend)
    options = {"centered": centered, "backend": backend}
    y, stats = read_norm(stream, mask, base, weight, bias, EPS, live=live, **options)
    expected, expected_stats = read_norm(stream, mask[kept], base, weight, bias, EPS, live=few, **options)
    torch.testing.assert_close(y[kept], expected)
    of_reads = read_norm_grad(grad, stats, stream, mask, base, weight, live=live, **options)
    expected = read_norm_grad(grad[kept], expected_stats, stream, mask[kept], base, weight, live=few, **options)
    torch.testing.assert_close(of_reads[kept], expected)


def test_the_node_of_its_own_and_autograd_agree(backend):
    (stream, mask, base, weight, bias), grad = _operands((4, 6, 3, 20), torch.float32, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (stream, mask, base)]
    y, stats = read_norm(*leaves, weight, bias, EPS, centered=True, backend=backend)
    assert not stats.requires_grad
    by_autograd = torch.autograd.grad(y, leaves, grad)
    grad_reads = read_norm_grad(grad, stats, stream, mask, base, weight, centered=True, backend=backend)
    grad_stream = torch.zeros_like(stream)
    grad_mask = masked_read_backward_(grad_reads, stream, mask, grad_stream, backend=backend)
    torch.testing.assert_close(by_autograd, (grad_stream, grad_mask, grad_reads.sum(0)))


def test_large_means_do_not_spoil_the_variance(backend, fused):
    (stream, mask, base, weight, bias), _ = _operands((3, 4, 2, 300), torch.float32, torch.float32)
    base += 10_000
    ours = read_norm(stream, mask, base, weight, bias, EPS, centered=True, backend=backend)[1][1]
    reads = reference.masked_read(stream, mask, base).double()
    exact = torch.rsqrt(reads.var(-1, correction=0) + EPS)
    # One rounding step of a read of 10000, beside deviations of about 1; a difference of squares would lose all digits.
    torch.testing.assert_close(ours.double(), exact, rtol=1e4 * torch.finfo(torch.float32).eps, atol=0)


def test_opcheck(backend):
    (stream, mask, base, weight, bias), grad = _operands((3, 4, 2, 6), torch.float32, torch.float32)
    op, live = torch.ops.fastcircuit, live_writers(mask)
    leaves = [t.clone().requires_grad_() for t in (stream, mask, base)]
    torch.library.opcheck(op.read_norm.default, (*leaves, weight, bias, EPS, True, 0, None, backend))
    torch.library.opcheck(op.read_norm.default, (stream, mask, None, weight, None, EPS, False, 2, live, backend))
    stats = torch.rand(2, 3, 2)
    torch.library.opcheck(op.read_norm_grad.default, (grad, stats, stream, mask, base, weight, True, 1, live, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight is torch\.float32 \[3\] on cpu; accepted is torch\.float32 \[4\]"),
        ({"bias": torch.ones(4, requires_grad=True)}, "bias requires grad; only stream, mask and base"),
        ({"plain": 2}, "plain is 2; accepted is 0 to the number of readers, 1"),
        ({"centered": False}, "RMSNorm .* has no bias"),
        ({"backend": "cpu"}, "it has no read_norm"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(change, message):
    arguments = {"stream": torch.ones(2, 3, 4), "mask": torch.ones(1, 2), "base": None, "weight": torch.ones(4)}
    arguments |= {"bias": torch.ones(4), "eps": EPS, "centered": True, **change}
    with pytest.raises(InputError, match=message):
        read_norm(**arguments)

"""masked_read and its in-place backward: every backend and instruction set against float64."""

import numpy as np
import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import live_writers, masked_read, masked_read_backward_, reference

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
    (3, 9, 5, 71),
    (1, 30, 13, 64),
    (37, 19, 50, 31),
    (200, 7, 3, 5),
    (0, 3, 2, 2),
    (3, 0, 2, 2),
    (7, 7, 0, 3),
    (7, 7, 3, 0),
]
INTERPRETED_SHAPES = [(1, 1, 1, 1), (5, 13, 11, 7), (17, 40, 3, 5), (0, 3, 2, 2), (3, 0, 2, 2), (7, 7, 0, 3)]
# More readers than one program takes, over more columns than one step; more writers than a model of 13B parameters.
LARGE_SHAPES = {(130, 3, 2, 300): torch.bfloat16, (2, 2000, 1, 33): torch.float32}


def _skip_what_the_backend_lacks(backend, shape, dtype):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels have no float16")
    if LARGE_SHAPES.get(shape, dtype) != dtype:
        pytest.skip("too large for every dtype")
    if backend == "triton" and shape not in [*INTERPRETED_SHAPES, *LARGE_SHAPES]:
        pytest.skip("too large for Triton's interpreter")


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


@pytest.mark.parametrize("shape", [*SHAPES, *INTERPRETED_SHAPES[1:3], *LARGE_SHAPES], ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_forward(backend, shape, dtype, mask_dtype, with_base):
    _skip_what_the_backend_lacks(backend, shape, dtype)
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


@pytest.mark.parametrize("shape", [*SHAPES, *INTERPRETED_SHAPES[1:3], *LARGE_SHAPES], ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", ["as stream", "float32", None])
def test_backward(backend, shape, dtype, mask_dtype, grad_dtype):
    _skip_what_the_backend_lacks(backend, shape, dtype)
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


@pytest.mark.parametrize("step", [1, 3])
def test_reads_a_prefix_or_every_kth_row_where_it_is(backend, step):
    buffer = torch.randn(12, 3, 5)
    stream, mask, grad_reads = buffer[:9:step], torch.rand(4, 9)[:, ::step], torch.randn(4, 3, 5)
    expected = reference.masked_read(stream.clone(), mask.clone(), None)
    torch.testing.assert_close(masked_read(stream, mask, backend=backend), expected)
    grad_buffer = torch.randn(12, 3, 5)
    before = grad_buffer.clone()
    grad_mask = masked_read_backward_(grad_reads, stream, mask, grad_buffer[:9:step], backend=backend)
    before[:9:step] += torch.einsum("rw,rtd->wtd", mask, grad_reads)
    torch.testing.assert_close(grad_buffer, before)
    torch.testing.assert_close(grad_mask, torch.einsum("rtd,wtd->rw", grad_reads, stream))


def test_operands_cut_from_bigger_tensors(backend):
    stream, mask, base = torch.randn(6, 3, 8)[..., 1:6], torch.rand(6, 3).T, torch.randn(5, 3).T
    expected = reference.masked_read(stream, mask, base)
    if backend in ("cpu", "triton"):
        with pytest.raises(InputError, match="each stream row is not contiguous"):
            masked_read(stream, mask, base, backend=backend)
        torch.testing.assert_close(masked_read(stream, mask, base), expected)
        stream = stream.contiguous()
    torch.testing.assert_close(masked_read(stream, mask, base, backend=backend), expected)
    offset = torch.randn(6 * 15 + 1)[1:].view(6, 3, 5)
    expected = reference.masked_read(offset, mask, base)
    torch.testing.assert_close(masked_read(offset, mask, base, backend=backend), expected)
    grad_reads = torch.randn(3).expand(5, 3).T[:, None].expand(3, 3, 5)
    assert not grad_reads.is_contiguous()
    expected = torch.einsum("rtd,wtd->rw", grad_reads, offset)
    torch.testing.assert_close(masked_read_backward_(grad_reads, offset, mask, None, backend=backend), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_thread_count_gives_the_same_answer_every_time(backend, threads, dtype):
    if backend == "triton":
        pytest.skip("threads are torch's")
    stream, mask, base, grad_reads = _operands((13, 21, 64, 33), dtype, torch.float32)
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reads = [masked_read(stream, mask, base, backend=backend) for _ in range(2)]
        grads = [torch.zeros_like(stream) for _ in range(2)]
        masks = [masked_read_backward_(grad_reads, stream, mask, grad, backend=backend) for grad in grads]
    finally:
        torch.set_num_threads(was)
    for first, second in (reads, grads, masks):
        assert torch.equal(first, second)
    torch.testing.assert_close(reads[0], reference.masked_read(stream, mask, base))
    exact = torch.einsum("rtd,wtd->rw", grad_reads.float(), stream.float())
    torch.testing.assert_close(masks[0], exact, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("live", [False, True])
def test_the_triton_backward_gives_the_same_bits_again(backend, dtype, live):
    """Of sums in several parts, by readers that two programs share."""
    if backend != "triton":
        pytest.skip("of the others, test_every_thread_count_gives_the_same_answer_every_time")
    stream, mask, _, grad_reads = _operands((130, 21, 4, 100), dtype, torch.float32)
    mask = _clamped(mask)
    listed = live_writers(mask, backend=backend) if live else None
    grads = [torch.ones_like(stream) for _ in range(2)]
    masks = [masked_read_backward_(grad_reads, stream, mask, grad, live=listed, backend=backend) for grad in grads]
    assert torch.equal(*grads)
    assert torch.equal(*masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_reads_written_around_the_cache(backend, dtype):
    if backend == "triton":
        pytest.skip("too large for Triton's interpreter")
    stream, mask = torch.randn(3, 128, 515).to(dtype), torch.rand(37, 3).to(dtype)
    exact = reference.masked_read(stream.double(), mask.double(), None)
    torch.testing.assert_close(masked_read(stream, mask, backend=backend), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_nan_or_infinity_stays_in_its_row_and_column(backend, dtype):
    stream, mask = torch.ones(3, 2, 5, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    stream[1, 1, 2], stream[2, 0, 0] = float("nan"), float("inf")
    reads = masked_read(stream, mask, backend=backend)
    assert reads[:, 1, 2].isnan().all()
    assert reads[:, 0, 0].isinf().all()
    assert reads.isfinite().sum() == reads.numel() - 8


def test_a_float32_mask_is_not_rounded_to_bfloat16(backend):
    """What is left of rows that cancel is what rounding the mask would lose, in a float32 gradient a second time."""
    stream, readers = torch.randn(1, 2, 5).bfloat16().expand(2, 2, 5).contiguous(), 10
    mask = torch.tensor([1 + 2**-10, -1.0]).expand(readers, 2)
    torch.testing.assert_close(masked_read(stream, mask, backend=backend), (stream[:1] * 2**-10).expand(readers, 2, 5))
    grad_reads = stream[:1].expand(readers, 2, 5).contiguous()
    for dtype, left in ((torch.bfloat16, 2**-10), (torch.float32, 2**-10 + 2**-20)):
        mask, grads = torch.full((readers, 2), -1.0), torch.zeros(2, 2, 5, dtype=dtype)
        mask[::2] = 1 + left
        masked_read_backward_(grad_reads, stream, mask, grads, backend=backend)
        expected = (stream.double() * left * (readers // 2)).to(dtype)
        torch.testing.assert_close(grads, expected, rtol=2**-13 if dtype == torch.float32 else 2**-7, atol=0)


def test_float32_masks_of_zeros_and_ones_read_the_same_bits_as_bfloat16_ones(backend):
    stream, mask, base, _ = _operands((13, 21, 3, 33), torch.bfloat16, torch.float32)
    mask = mask.round()
    expected = masked_read(stream, mask.bfloat16(), base, backend=backend)
    assert torch.equal(masked_read(stream, mask, base, backend=backend), expected)


def test_only_the_gradients_asked_for(backend):
    stream, mask, base, _ = _operands((3, 4, 2, 5), torch.float64, torch.float64)
    for wanted in range(3):
        inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((stream, mask, base))]
        masked_read(*inputs, backend=backend).square().sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]


def test_second_derivative_is_refused():
    stream, mask = (torch.rand(s, requires_grad=True) for s in ((2, 1, 3), (1, 2)))
    (grad,) = torch.autograd.grad(masked_read(stream, mask).square().sum(), mask, create_graph=True)
    with pytest.raises(InputError, match="second derivatives"):
        grad.sum().backward()


def test_backward_refuses_tensors_that_require_grad():
    stream, mask = torch.rand(2, 1, 3), torch.rand(1, 2, requires_grad=True)
    with pytest.raises(InputError, match="no_grad"):
        masked_read_backward_(torch.rand(1, 1, 3), stream, mask, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": torch.ones(2, 3)}, r"masked_read: stream has shape \[2, 3\]; accepted is \[W, T, d\]"),
        ({"mask": torch.ones(4, 5)}, r"mask has shape \[4, 5\]; accepted is \[R, 2\]"),
        ({"base": torch.ones(4, 3)}, r"base has shape \[4, 3\]; accepted is \[3, 4\]"),
        ({"mask": torch.ones(4, 2, dtype=torch.float64)}, "mask is torch.float64 with a torch.float32 stream"),
        ({"base": torch.ones(3, 4, dtype=torch.float64)}, "base is torch.float64; accepted is torch.float32"),
        ({"stream": torch.ones(2, 3, 4, dtype=torch.int64)}, "stream is torch.int64; accepted are float32"),
        ({"mask": torch.ones(4, 2, device="meta")}, "mask is on meta; accepted is the device of stream, cpu"),
        ({"backend": "gpu"}, "backend: got 'gpu'; accepted are auto, reference, cpu, triton"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(change, message):
    arguments = {"stream": torch.ones(2, 3, 4), "mask": torch.ones(4, 2), "base": None, **change}
    with pytest.raises(InputError, match=message):
        masked_read(**arguments)


def test_backward_errors_name_the_argument():
    stream, mask, grad_reads = torch.ones(2, 3, 4), torch.ones(5, 2), torch.ones(5, 3, 4)
    with pytest.raises(InputError, match=r"masked_read_backward_: grad_reads has shape \[4, 3, 4\]"):
        masked_read_backward_(grad_reads[:4], stream, mask, None)
    with pytest.raises(InputError, match=r"grad_stream has shape \[1, 3, 4\]; accepted is \[2, 3, 4\]"):
        masked_read_backward_(grad_reads, stream, mask, stream[:1])


LIVE_SHAPES = [(5, 13, 11, 7), (17, 40, 3, 5), (1, 1, 1, 1), (0, 3, 2, 2), (3, 0, 2, 2)]


def _clamped(mask):
    """``mask`` as hard-concrete samples are: a third 0, a third 1, some writers dead, some read at 1 alone."""
    mask = (mask * 3 - 1).clamp(0, 1)
    mask[:, ::3] = 0
    mask[:, 1::3] = mask[:, 1::3].round()
    return mask


def _skip_without_live(backend):
    if backend == "cpu":
        pytest.skip("the C++ kernels take no live list")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*LIVE_SHAPES, (3, 700, 1, 1)], ids=str)
@pytest.mark.parametrize("chosen", [False, True])
def test_live_writers(backend, dtype, shape, chosen):
    _skip_without_live(backend)
    mask = _clamped(_operands(shape, dtype, dtype)[1])
    wanted = (torch.arange(shape[0]) % 3 > 0).int() if chosen else None
    counts, order, flags = live_writers(mask, wanted, backend=backend).split([2, shape[1], shape[0]])
    if chosen:
        mask = torch.where(wanted[:, None] != 0, mask, torch.nan)[wanted != 0]
    assert flags.tolist() == (wanted.tolist() if chosen else [1] * shape[0])
    is_open, is_live = ((mask > 0) & (mask < 1)).any(0), mask.any(0)
    expected = [is_open.nonzero(), (is_live & ~is_open).nonzero(), (~is_live).nonzero()]
    assert counts.tolist() == [is_open.sum(), is_live.sum()]
    assert order.tolist() == torch.cat(expected).flatten().tolist()


@pytest.mark.parametrize("shape", LIVE_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "mask_dtype"), [DTYPES[0], DTYPES[3]], ids=str)
def test_live_rows_alone_are_touched(backend, shape, dtype, mask_dtype):
    """Dead rows hold NaN; open ones alone have a mask gradient; what is read is as exact as without a list."""
    _skip_without_live(backend)
    stream, mask, base, grad_reads = _operands(shape, dtype, mask_dtype)
    mask = _clamped(mask)
    live = live_writers(mask, backend=backend)
    poisoned = torch.where((mask != 0).any(0)[:, None, None], stream, torch.nan)
    ours = masked_read(poisoned, mask, base, live=live, backend=backend)
    exact = _exact(mask) @ _exact(stream) + _exact(base[None])
    _assert_as_good_as_torch(ours, reference.masked_read(stream, mask, base), exact)

    buffer, plain = (torch.ones(stream.shape, dtype=dtype) for _ in range(2))
    ours_mask = masked_read_backward_(grad_reads, poisoned, mask, buffer, live=live, backend=backend)
    plain_mask = reference.masked_read_backward_(grad_reads, stream, mask, plain, True)
    is_open = (mask > 0) & (mask < 1)
    exact_mask = _exact(grad_reads) @ _exact(stream).T * is_open.numpy()
    _assert_as_good_as_torch(ours_mask, plain_mask * is_open, exact_mask)
    _assert_as_good_as_torch(buffer, plain, 1 + _exact(mask).T @ _exact(grad_reads))
    assert not ours_mask[~is_open].any()


@pytest.mark.parametrize("readers", [5, 17, 130])
@pytest.mark.parametrize("every", [2, 1])
def test_readers_that_are_not_wanted_might_not_be_there(backend, readers, every):
    """Their masks are NaN, and so are the gradients of their reads; with ``every`` 1 none is wanted."""
    _skip_without_live(backend)
    stream, mask, base, grad_reads = _operands((readers, 13, 3, 7), torch.bfloat16, torch.float32)
    mask, wanted = _clamped(mask), (torch.arange(readers) % every > 0).int()
    kept = wanted != 0
    mask[~kept], grad_reads[~kept] = torch.nan, torch.nan
    live, few = live_writers(mask, wanted, backend=backend), live_writers(mask[kept], backend=backend)
    ours = masked_read(stream, mask, base, live=live, backend=backend)[kept]
    torch.testing.assert_close(ours, masked_read(stream, mask[kept], base, live=few, backend=backend), rtol=0, atol=0)
    buffers = [torch.ones(stream.shape) for _ in range(2)]
    ours = masked_read_backward_(grad_reads, stream, mask, buffers[0], live=live, backend=backend)
    rest = masked_read_backward_(grad_reads[kept], stream, mask[kept], buffers[1], live=few, backend=backend)
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[kept], rest, rtol=1e-6, atol=1e-6)
    assert not ours[~kept].any()
    only = masked_read_backward_(grad_reads, stream, mask, None, live=live, backend=backend)
    torch.testing.assert_close(only, ours, rtol=1e-5, atol=1e-5)


def test_the_base_gets_no_gradient_of_readers_that_are_not_wanted(backend):
    _skip_without_live(backend)
    stream, mask, base, weight = _operands((4, 9, 3, 5), torch.float64, torch.float64)
    wanted = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    base = base.requires_grad_()
    reads = masked_read(stream, mask, base, live=live_writers(mask, wanted, backend=backend), backend=backend)
    weight[1::2] = torch.nan
    torch.testing.assert_close(torch.autograd.grad(reads, base, weight)[0], weight[::2].sum(0))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_live_gradients_are_a_clamped_samples(backend, wanted):
    _skip_without_live(backend)
    stream, logits, base, weight = _operands((4, 9, 3, 5), torch.float64, torch.float64)
    logits[:, ::2] -= 2.0
    results = []
    for skipping in (True, False):
        leaves = [t.clone().requires_grad_(needed) for t, needed in zip((stream, logits), wanted, strict=True)]
        mask = (leaves[1] * 3 - 1).clamp(0, 1)
        live = live_writers(mask.detach(), backend=backend) if skipping else None
        (masked_read(leaves[0], mask, base, live=live, backend=backend) * weight).sum().backward()
        results.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    torch.testing.assert_close(*results)
    assert len(results[0]) == sum(wanted)


def test_a_list_that_does_not_fit_is_named():
    stream, mask = torch.ones(2, 3, 4), torch.ones(5, 2)
    with pytest.raises(InputError, match=r"live has shape \[4\]; accepted is \[9\]"):
        masked_read(stream, mask, live=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(InputError, match=r"live is torch\.int64; accepted is torch.int32"):
        masked_read(stream, mask, live=torch.zeros(9, dtype=torch.int64))
    with pytest.raises(InputError, match=r"wanted has shape \[2\]; accepted is \[5\]"):
        live_writers(mask, torch.ones(2, dtype=torch.int32))
    with pytest.raises(InputError, match="kernels take no live list"):
        masked_read(stream, mask, live=live_writers(mask), backend="cpu")
    with pytest.raises(InputError, match=r"live_writers: mask is torch.int64"):
        live_writers(mask.long())

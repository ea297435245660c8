"""packed_attention and its gradients: every backend and instruction set against float64, sequence by sequence."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import packed_attention, reference

LENGTHS = [1, 7, 20, 33, 2]
# query heads, key heads, width of a head, width of the rotary tables
SHAPES = [(4, 2, 8, 8), (3, 3, 5, 4), (8, 4, 64, 0), (6, 1, 17, 16), (1, 1, 1, 0)]
SEEN = {
    "causal": (True, None),
    "causal window": (True, 3),
    "all": (False, None),
    "window": (False, 4),
    "wide": (True, 99),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}


def _operands(shape, dtype, lengths=LENGTHS):
    heads, kv_heads, width, rotary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    tokens = sum(lengths)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tables = (draw(tokens, rotary), draw(tokens, rotary)) if rotary else None
    query, key, value = (draw(count, tokens, width) for count in (heads, kv_heads, kv_heads))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return query, key, value, starts, tables, draw(tokens, heads * width)


def _run(query, key, value, starts, tables, grad, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    out = packed_attention(*leaves, starts, scale=0.3, rotary=tables, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _wide(operands):
    query, key, value, starts, tables, grad = operands
    tables = None if tables is None else tuple(table.double() for table in tables)
    return query.double(), key.double(), value.double(), starts, tables, grad.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seen", SEEN)
def test_output_and_gradients(backend, dtype, shape, seen):
    causal, window = SEEN[seen]
    operands = _operands(shape, dtype)
    ours = _run(*operands, causal=causal, window=window, backend=backend)
    exact = _run(*_wide(operands), causal=causal, window=window, backend="reference")
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1e-6)


def test_any_assignment_of_heads_to_key_heads(backend):
    query, key, value, starts, tables, grad = _operands((5, 3, 8, 8), torch.float64)
    kv_of_head = torch.tensor([2, 0, 0, 1, 2])
    ours = _run(query, key, value, starts, tables, grad, kv_of_head=kv_of_head, backend=backend)
    expected = _run(query, key[kv_of_head], value[kv_of_head], starts, tables, grad, backend="reference")
    torch.testing.assert_close(ours[:2], expected[:2])
    for found, per_head in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found).index_add(0, kv_of_head, per_head))


def test_reference_is_softmax_attention():
    query, key, value, starts, tables, _ = _operands((2, 2, 6, 0), torch.float64)
    out = reference.packed_attention(query, key, value, starts, torch.arange(2), tables, 0.3, True, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, 8:28], key[:, 8:28], value[:, 8:28], is_causal=True, scale=0.3
    )
    torch.testing.assert_close(out[8:28].unflatten(1, (2, 6)).transpose(0, 1), expected)


def test_gradcheck(backend):
    query, key, value, starts, tables, _ = _operands((2, 1, 4, 2), torch.float64, [3, 2])
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *operands: packed_attention(*operands, starts, scale=0.7, rotary=tables, backend=backend), leaves
    )


def test_large_scores_do_not_overflow_and_tiny_weights_vanish(backend):
    query, key, value, starts, _, grad = _operands((2, 2, 8, 0), torch.float32)
    ours = _run(query * 100, key, value, starts, None, grad, backend=backend)
    exact = _run(query.double() * 100, key.double(), value.double(), starts, None, grad.double(), backend="reference")
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", range(3))
def test_nan_reaches_the_output(backend, which):
    operands = [*_operands((2, 1, 8, 0), torch.float32)]
    operands[which][0, 3, 2] = torch.nan
    out, *_ = _run(*operands, backend=backend)
    assert out[3].isnan().any()
    assert not out[8:].isnan().any()


def test_operands_may_be_strided(backend):
    query, key, value, starts, tables, grad = _operands((4, 2, 8, 8), torch.float64)
    expected = _run(query, key, value, starts, tables, grad, backend=backend)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    ours = _run(*strided, starts, tables, grad.T.contiguous().T, backend=backend)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_threads_do_not_change_a_bit(backend):
    operands = _operands((8, 4, 16, 16), torch.float32, [30] * 40)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(_run(*operands, backend=backend))
    torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0 if backend == "cpu" else 1e-5)


def test_bad_calls_are_named():
    query, key, value, starts, _, _ = _operands((4, 2, 8, 0), torch.float32)
    with pytest.raises(InputError, match="have shapes"):
        packed_attention(query, key[:, 1:], value, starts, scale=1.0)
    with pytest.raises(InputError, match="differ"):
        packed_attention(query, key.double(), value, starts, scale=1.0)
    with pytest.raises(InputError, match="ascending int64 from 0 to 63 on the CPU"):
        packed_attention(query, key, value, starts - 1, scale=1.0)
    half = [tensor.half() for tensor in (query, key, value)]
    with pytest.raises(InputError, match="kernels have float32"):
        packed_attention(*half, starts, scale=1.0, backend="cpu")


@pytest.mark.parametrize(
    ("kv_of_head", "message"),
    [
        (torch.tensor([0, 0, 1, 2]), "kv_of_head holds 2; accepted: 0 to 1"),
        (torch.tensor([0, -1, 1, 1]), "kv_of_head holds -1; accepted: 0 to 1"),
        (torch.tensor([0, 0, 1]), r"kv_of_head is torch.int64 \[3\] on cpu; accepted: int64 \[4\] on the CPU"),
        (torch.tensor([[0, 0, 1, 1]]), r"kv_of_head is torch.int64 \[1, 4\]"),
        (torch.tensor([0, 0, 1, 1], dtype=torch.int32), "kv_of_head is torch.int32"),
        (torch.tensor([0, 0, 1, 1], device="meta"), r"kv_of_head is torch.int64 \[4\] on meta"),
    ],
)
def test_kv_heads_that_are_none_are_refused(backend, kv_of_head, message):
    query, key, value, starts, _, _ = _operands((4, 2, 8, 0), torch.float32)
    with pytest.raises(InputError, match=message):
        packed_attention(query, key, value, starts, scale=1.0, kv_of_head=kv_of_head, backend=backend)


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_heads_that_make_no_equal_groups_are_refused(kv_heads):
    query, key, value, starts, _, _ = _operands((5, kv_heads, 8, 0), torch.float32)
    with pytest.raises(InputError, match=f"5 heads do not divide into {kv_heads} equal groups; give kv_of_head"):
        packed_attention(query, key, value, starts, scale=1.0)


def test_rotary_tables_and_windows_that_do_not_fit_are_refused():
    query, key, value, starts, (cos, sin), _ = _operands((4, 2, 8, 8), torch.float32)
    for tables in ((cos[1:], sin[1:]), (cos, sin[:, 2:]), (cos[:, 1:], sin[:, 1:]), (cos.repeat(1, 2),) * 2):
        with pytest.raises(InputError, match=r"rotary tables have shapes .* d_rotary even and at most 8"):
            packed_attention(query, key, value, starts, scale=1.0, rotary=tables)
    with pytest.raises(InputError, match="window is 0; accepted: at least 1"):
        packed_attention(query, key, value, starts, scale=1.0, window=0)


def test_groups_are_made_on_the_cpu_and_may_be_differentiated():
    """Whatever the default device and mode of the call that made them first."""
    operands = _operands((6, 3, 4, 0), torch.float32)
    with torch.inference_mode(), torch.device("meta"):
        packed_attention(*operands[:4], scale=0.3)
    for ours, given in zip(
        _run(*operands, backend="reference"),
        _run(*operands, kv_of_head=torch.arange(6) // 2, backend="reference"),
        strict=True,
    ):
        assert torch.equal(ours, given)

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
IN_THE_INTERPRETER = {
    torch.float64: [(SHAPES[1], "causal window")],
    torch.float32: [(SHAPES[0], seen) for seen in SEEN],
    torch.bfloat16: [(shape, "causal") for shape in SHAPES],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}


def _lengths(backend):
    """Sequences' lengths: the interpreter takes seconds for one."""
    return LENGTHS[:2] if backend == "triton" else LENGTHS


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
    if backend == "triton" and (shape, seen) not in IN_THE_INTERPRETER[dtype]:
        pytest.skip("in the interpreter, which takes a second for each, one axis at a time")
    operands = _operands(shape, dtype, LENGTHS[3:] if backend == "triton" else LENGTHS)
    ours = _run(*operands, causal=causal, window=window, backend=backend)
    exact = _run(*_wide(operands), causal=causal, window=window, backend="reference")
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1e-6)


def test_any_assignment_of_heads_to_key_heads(backend):
    query, key, value, starts, tables, grad = _operands((5, 3, 8, 8), torch.float64, _lengths(backend))
    kv_of_head = torch.tensor([2, 0, 0, 1, 2])
    ours = _run(query, key, value, starts, tables, grad, kv_of_head=kv_of_head, backend=backend)
    expected = _run(query, key[kv_of_head], value[kv_of_head], starts, tables, grad, backend="reference")
    torch.testing.assert_close(ours[:2], expected[:2])
    for found, per_head in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found).index_add(0, kv_of_head, per_head))


def test_reference_is_softmax_attention():
    query, key, value, starts, tables, _ = _operands((2, 2, 6, 0), torch.float64)
    assert tables is None
    out, _ = reference.packed_attention(query, key, value, starts, 33, None, None, None, None, 0.3, True, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, 8:28], key[:, 8:28], value[:, 8:28], is_causal=True, scale=0.3
    )
    torch.testing.assert_close(out[8:28].unflatten(1, (2, 6)).transpose(0, 1), expected)


def test_gradcheck(backend):
    if backend == "triton":
        pytest.skip("in the interpreter it takes a minute; test_output_and_gradients has its gradients in float64")
    query, key, value, starts, tables, _ = _operands((2, 1, 4, 2), torch.float64, [3, 2])
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *operands: packed_attention(*operands, starts, scale=0.7, rotary=tables, backend=backend), leaves
    )


def test_large_scores_do_not_overflow_and_tiny_weights_vanish(backend):
    query, key, value, starts, _, grad = _operands((2, 2, 8, 0), torch.float32, _lengths(backend))
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
    query, key, value, starts, tables, grad = _operands((4, 2, 8, 8), torch.float64, _lengths(backend))
    expected = _run(query, key, value, starts, tables, grad, backend=backend)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    ours = _run(*strided, starts, tables, grad.T.contiguous().T, backend=backend)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_threads_do_not_change_a_bit(backend):
    if backend == "triton":
        pytest.skip("no threads of torch's run it")
    operands = _operands((8, 4, 16, 16), torch.float32, [30] * 40)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(_run(*operands, backend=backend))
    torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5 if backend == "reference" else 0)


@pytest.mark.parametrize(
    ("shape", "dead"), [((4, 2, 8, 8), "one of a group"), ((4, 2, 8, 8), "a group"), ((2, 2, 5, 4), "all")], ids=str
)
def test_heads_that_are_left_out(backend, shape, dead):
    """They and the keys that only they use hold NaN, and so does the gradient of their output."""
    if backend == "cpu":
        pytest.skip("the C++ kernel leaves out no heads")
    query, key, value, starts, tables, grad = _operands(shape, torch.float32, _lengths(backend))
    (heads, kv_heads, width, _), group = shape, shape[0] // shape[1]
    alive = torch.ones(heads, dtype=torch.int32)
    alive[: {"one of a group": 1, "a group": group, "all": heads}[dead]] = 0
    off = alive == 0
    keys_off = off.view(kv_heads, group).all(1)
    poisoned = query, key, value, grad = [tensor.clone() for tensor in (query, key, value, grad)]
    query[off], key[keys_off], value[keys_off] = torch.nan, torch.nan, torch.nan
    grad.view(-1, heads, width)[:, off] = torch.nan
    ours = _run(query, key, value, starts, tables, grad, alive=alive, backend=backend)
    query, key, value, grad = (tensor.nan_to_num() for tensor in poisoned)
    out, *expected = _run(query, key, value, starts, tables, grad, backend=backend)
    out = out.view(-1, heads, width).masked_fill(off[:, None], 0).flatten(1)
    for found, wanted in zip(ours, (out, *expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not ours[0].view(-1, heads, width)[:, off].any()
    assert not ours[1][off].any()
    assert not ours[2][keys_off].any()


def test_empty_sequences_change_nothing(backend):
    lengths = _lengths(backend)
    operands = _operands((2, 1, 8, 8), torch.float32, lengths)
    starts = torch.tensor([0, 0, *lengths, 0, 0]).cumsum(0)
    ours = _run(*operands[:3], starts, *operands[4:], longest=60, backend=backend)
    torch.testing.assert_close(ours, _run(*operands, backend=backend), rtol=0, atol=0)


def test_bad_calls_are_named():
    query, key, value, starts, _, _ = _operands((4, 2, 8, 0), torch.float32)
    with pytest.raises(InputError, match="have shapes"):
        packed_attention(query, key[:, 1:], value, starts, scale=1.0)
    with pytest.raises(InputError, match="differ"):
        packed_attention(query, key.double(), value, starts, scale=1.0)
    with pytest.raises(InputError, match="ascending int64 from 0 to 63 on the CPU"):
        packed_attention(query, key, value, starts - 1, scale=1.0)
    with pytest.raises(InputError, match=r"alive is torch.int64 \[4\] on cpu; accepted: int32 \[4\]"):
        packed_attention(query, key, value, starts, scale=1.0, alive=torch.ones(4, dtype=torch.int64))
    with pytest.raises(InputError, match="the kernel leaves out no heads"):
        packed_attention(query, key, value, starts, scale=1.0, alive=torch.ones(4, dtype=torch.int32), backend="cpu")
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


def test_groups_are_made_on_the_cpu_and_may_be_differentiated(backend):
    """Whatever the default device and mode of the call that made them first."""
    operands = _operands((6, 3, 4, 0), torch.float32, _lengths(backend))
    with torch.inference_mode(), torch.device("meta"):
        packed_attention(*operands[:4], scale=0.3, backend=backend)
    for ours, given in zip(
        _run(*operands, backend=backend), _run(*operands, kv_of_head=torch.arange(6) // 2, backend=backend), strict=True
    ):
        assert torch.equal(ours, given)


OPTIONS = {
    "plain": {},
    "any heads": {"kv_of_head": torch.tensor([1, 0, 0, 1])},
    "window, both ways": {"causal": False, "window": 2},
    "left out": {"alive": torch.tensor([1, 0, 1, 1], dtype=torch.int32)},
}


def _options(which, backend):
    if which == "left out" and backend == "cpu":
        pytest.skip("the C++ kernel leaves out no heads")
    return {**OPTIONS[which], "backend": backend}


@pytest.mark.parametrize("which", OPTIONS)
def test_opcheck(backend, which):
    query, key, value, starts, tables, grad = _operands((4, 2, 8, 4), torch.float32, [3, 4])
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    given = {"kv_of_head": None, "alive": None, "causal": True, "window": None, **_options(which, backend)}
    if which == "left out":  # the sums of a head that is left out may be anything
        given["alive"] = torch.ones(4, dtype=torch.int32)
    rest = (starts, None, given["kv_of_head"], given["alive"], *tables, 0.3, given["causal"], given["window"], backend)
    op = torch.ops.fastcircuit
    torch.library.opcheck(op.packed_attention.default, (*leaves, *rest))
    out, lse = op.packed_attention.default(query, key, value, *rest)
    kept = (out, lse) if lse.dim() == 2 else (None, None)
    torch.library.opcheck(op.packed_attention_grads.default, (grad, *kept, query, key, value, *rest))


@pytest.mark.parametrize("which", OPTIONS)
def test_compiled_equals_eager(backend, which):
    options = _options(which, backend)
    query, key, value, starts, tables, grad = _operands((4, 2, 8, 4), torch.float32, [3, 4])

    def attend(query, key, value, starts):
        return packed_attention(query * 2, key, value.sin(), starts, scale=0.3, rotary=tables, **options).cos()

    results = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out = run(*leaves, starts)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    torch.testing.assert_close(results[1], results[0])


def test_what_is_compiled_checks_what_it_is_given(backend):
    query, key, value, starts, _, _ = _operands((4, 2, 8, 0), torch.float32, [3, 4])
    attend = lambda starts: packed_attention(query, key, value, starts, scale=0.3, backend=backend)  # noqa: E731
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(starts), attend(starts))
    with pytest.raises(InputError, match="ascending int64 from 0 to 7 on the CPU"):
        run(torch.tensor([0, 9, 7]))


def test_the_direct_path_equals_the_dispatched_one(backend):
    query, key, value, starts, tables, _ = _operands((4, 2, 8, 8), torch.float32, _lengths(backend))
    ours = packed_attention(query, key, value, starts, scale=0.3, rotary=tables, backend=backend)
    rest = (starts, None, None, None, *tables, 0.3, True, None, backend)
    assert torch.equal(ours, torch.ops.fastcircuit.packed_attention(query, key, value, *rest)[0])


def test_runs_under_fake_tensors_and_on_meta():
    for where in (torch._subclasses.FakeTensorMode(), torch.device("meta")):
        with where:
            query, key, starts = torch.empty(4, 7, 8), torch.empty(2, 7, 8), torch.empty(3, dtype=torch.int64)
            assert packed_attention(query, key, key, starts, scale=0.3).shape == (7, 32)


def test_second_derivative_is_refused(backend):
    query, key, value, starts, _, _ = _operands((2, 1, 4, 0), torch.float32, [3, 2])
    out = packed_attention(query.requires_grad_(), key, value, starts, scale=0.3, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(InputError, match="second derivatives are not implemented"):
        grad.sum().backward()

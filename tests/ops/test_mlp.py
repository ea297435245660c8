"""mlp and its gradient: every backend and instruction set against float64."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import Affine, extension, mlp, mlp_grad
from fastcircuit.ops.mlp import ACTIVATIONS, SMALL_BYTES, runs_compiled

# tokens, d, h: one of everything, primes, several panels, several blocks of rows, several chunks of tokens, none
SHAPES = [(1, 1, 1), (5, 7, 3), (13, 37, 101), (96, 64, 172), (50, 130, 1100), (8, 1030, 70), (1030, 16, 24), (0, 8, 4)]


def _operands(shape, dtype, gated, layout, biases=True):
    """``x``, the gradient of the output, and gate, up, down, all of them cut from bigger tensors."""
    tokens, width, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def affine(inner, outer):
        if layout == "linear":  # [out, in]
            weight = draw(outer + 2, inner + 3)[1:-1, 2:-1].T
        elif layout == "conv1d":  # [in, out]
            weight = draw(inner + 2, outer + 3)[1:-1, 2:-1]
        else:
            weight = draw(inner, 2, outer, 3)[:, 1, :, 2]
        return Affine(weight, draw(outer + 2)[1:-1] if biases else None)

    gate = affine(width, hidden) if gated else None
    x, grad = (draw(tokens + 2, width + 3)[1:-1, 1:-2] for _ in range(2))
    return x, grad, gate, affine(width, hidden), affine(hidden, width)


def _double(affine):
    return affine and Affine(affine.weight.double(), None if affine.bias is None else affine.bias.double())


def _run(x, grad, gate, up, down, activation, backend):
    """The output and the gradient of ``x``."""
    y, slopes = mlp(x, gate, up, down, activation, keep=True, backend=backend)
    assert slopes is not None
    return y, mlp_grad(grad, slopes, gate, up, down, backend=backend)


def _exact(x, grad, gate, up, down, activation):
    x, grad, *parts = x.double(), grad.double(), *(_double(part) for part in (gate, up, down))
    return _run(x, grad, *parts, activation, "reference")


def _skip_triton(backend):
    if backend == "triton":
        pytest.skip("there is no Triton kernel for it")


@pytest.mark.parametrize("layout", ["linear", "conv1d", "strided"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, shape, dtype, gated, layout):
    _skip_triton(backend)
    operands = _operands(shape, dtype, gated, layout)
    activation = "silu" if gated else "gelu_tanh"
    ours, exact = _run(*operands, activation, backend), _exact(*operands, activation)
    plain = _run(*operands, activation, "reference")
    for found, truth, torchs in zip(ours, exact, plain, strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert found.shape == (shape[0], shape[1])
        if not found.numel():
            continue
        error, limit = ((value.double() - truth).abs().max() for value in (found, torchs))
        # In float64 the truth is no better than what is measured with it: a few roundings of a sum of as many terms.
        limit = limit if dtype == torch.float32 else truth.abs().max() * torch.finfo(dtype).eps * 20
        assert error <= 2 * limit + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_formula_and_its_gradient(backend, activation, gated, biases):
    _skip_triton(backend)
    x, grad, gate, up, down = _operands((9, 10, 33), torch.float64, gated, "linear", biases)
    act = {
        "relu": torch.relu,
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: x * torch.special.ndtr(x),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }[activation]

    def apply(affine, x):
        return x @ affine.weight + (0 if affine.bias is None else affine.bias)

    leaf = x.clone().requires_grad_()
    expected = apply(down, act(apply(up, leaf)) if gate is None else act(apply(gate, leaf)) * apply(up, leaf))
    expected.backward(grad)
    y, grad_x = _run(x, grad, gate, up, down, activation, backend)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad_x, leaf.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_as_exact_as_torchs(backend, activation, dtype):
    """With weights of 1 the output is the activation, and the gradient its derivative."""
    _skip_triton(backend)
    one = Affine(torch.ones(1, 1, dtype=dtype), None)
    eps = torch.finfo(dtype).eps
    for low, high in ((0, 1e-3), (1e-3, 0.3), (0.3, 1), (1, 1.6), (1.4, 3), (3, 6), (6, 20)):
        size = torch.linspace(low, high, 5003, dtype=torch.float64).to(dtype)
        for x in (size[:, None], -size[:, None]):
            operands = x, torch.ones_like(x), None, one, one
            exact = _exact(*operands, activation)
            ours, plain = (_run(*operands, activation, name) for name in (backend, "reference"))
            for found, truth, torchs in zip(ours, exact, plain, strict=True):
                error, limit = ((value.double() - truth).abs().max() for value in (found, torchs))
                # In float64 the truth is torch's, which adds numbers to 1 before it multiplies with x.
                slack = eps * (truth.abs().max() if dtype == torch.float32 else 4 * max(high, 1))
                assert error <= 2 * limit + slack, (low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_numbers_neither_overflow_nor_vanish(backend, activation, dtype):
    _skip_triton(backend)
    one = Affine(torch.ones(1, 1, dtype=dtype), None)
    x = torch.tensor([-1e4, -1e3, -90.0, -13.2, -0.0, 0.0, 1e-30, 13.2, 90.0, 1e3, 1e4], dtype=dtype)[:, None]
    y, slope = _run(x, torch.ones_like(x), None, one, one, activation, backend)
    assert y.isfinite().all()
    assert slope.isfinite().all()
    torch.testing.assert_close(y[-3:], x[-3:])
    torch.testing.assert_close(slope[-3:], torch.ones_like(x[-3:]))
    assert (y[:3].abs() < 1e-30).all()
    assert (slope[:3].abs() < 1e-30).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_its_own_token_only(backend, activation):
    _skip_triton(backend)
    x, grad, gate, up, down = _operands((9, 10, 33), torch.float32, True, "linear")
    x[4, 3] = torch.nan
    y, grad_x = _run(x, grad, gate, up, down, activation, backend)
    for result in (y, grad_x):
        assert result[4].isnan().all()
        assert not result[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_keeping_nothing_changes_no_bit(backend):
    _skip_triton(backend)
    x, _, *parts = _operands((50, 64, 172), torch.float32, True, "linear")
    y, slopes = mlp(x, *parts, "silu", keep=False, backend=backend)
    assert slopes is None
    assert torch.equal(y, mlp(x, *parts, "silu", keep=True, backend=backend)[0])


@pytest.mark.parametrize("shape", [(240, 64, 172), (100, 300, 700)], ids=str)
def test_every_number_of_threads_gives_the_same_bits(backend, shape):
    if backend != "cpu":
        pytest.skip("torch's own products")
    operands = _operands(shape, torch.float32, True, "linear")
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(_run(*operands, "silu", backend))
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(result, results[0], strict=True))


def test_the_kernel_is_taken_where_it_pays(monkeypatch):
    if extension.missing_reason() is not None:
        pytest.skip("there are no C++ kernels")
    x, small = torch.ones(3, 64), torch.ones(64, 172)
    large = torch.ones(SMALL_BYTES // 64, 64).T
    for faster in (True, False):
        monkeypatch.setattr(extension, "outruns_mkl", lambda faster=faster: faster)
        assert runs_compiled(x, small)
        assert runs_compiled(x, large) is faster
    assert not runs_compiled(x.bfloat16(), small.bfloat16())
    assert not runs_compiled(x, small, backend="reference")
    assert not runs_compiled(x.to("meta"), small.to("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, "accepted are"),
        ({"up": Affine(torch.ones(5, 3), None)}, "x has shape"),
        ({"gate": Affine(torch.ones(4, 5), None)}, "gate has shape"),
        ({"down": Affine(torch.ones(4, 3), None)}, "down has shape"),
        ({"up": Affine(torch.ones(4, 3), torch.ones(4))}, "bias of up"),
        ({"down": Affine(torch.ones(3, 4).double(), None)}, "down is torch.float64"),
        ({"activation": "tanh"}, "accepted are relu, silu"),
    ],
)
def test_wrong_operands_are_one_clear_line(change, message):
    given = {
        "x": torch.ones(2, 4),
        "gate": Affine(torch.ones(4, 3), torch.ones(3)),
        "up": Affine(torch.ones(4, 3), None),
        "down": Affine(torch.ones(3, 4), torch.ones(4)),
        "activation": "silu",
        "keep": True,
    }
    with pytest.raises(InputError, match=message):
        mlp(**(given | change))


def test_slopes_of_the_wrong_shape_are_refused():
    up, down = Affine(torch.ones(4, 3), None), Affine(torch.ones(3, 4), None)
    with pytest.raises(InputError, match="slopes is"):
        mlp_grad(torch.ones(2, 4), torch.ones(2, 2, 3), None, up, down)

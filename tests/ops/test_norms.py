"""rms_norm and its gradients: every backend and instruction set against exact values."""

import numpy as np
import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import cpu as cpu_launcher
from fastcircuit.ops import reference, rms_norm

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 7), (7,), (3, 11, 64), (2, 3, 4, 17), (13, 768), (2, 3, 5120), (0, 8), (3, 0), (2, 0, 5)]


def _operands(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(*shape), draw(shape[-1]), draw(*shape)


def _exact(tensor):
    """The values in numpy's long double, in which float64 can be judged too."""
    return tensor.double().numpy().astype(np.longdouble)


def _exact_norm(x, weight):
    x, weight = _exact(x), _exact(weight)
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.longdouble(EPS))
    return x * rstd * weight


def _exact_grads(grad, x, weight):
    grad, x, weight = _exact(grad), _exact(x), _exact(weight)
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.longdouble(EPS))
    g = grad * weight
    grad_x = rstd * (g - x * rstd**2 * (g * x).mean(-1, keepdims=True))
    return grad_x, (grad * x * rstd).sum(tuple(range(x.ndim - 1)))


def _assert_as_good_as_torch(ours, plain, exact):
    """Error against the exact values at most twice that of plain torch in the same dtype, plus one rounding step."""
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    assert ours.is_contiguous()
    assert not ours.isnan().any()
    if ours.numel() == 0:
        return
    step = torch.finfo(ours.dtype).eps * np.abs(exact).max()
    assert np.abs(_exact(ours) - exact).max() <= 2 * np.abs(_exact(plain) - exact).max() + step


def _skip_if_unsupported(backend, dtype):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels have no float16")


def _plain_grads(grad, x, weight):
    """What torch's own autograd makes of the formula, operation by operation in the dtype."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(reference.rms_norm(x, weight, EPS), (x, weight), grad)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(backend, shape, dtype):
    _skip_if_unsupported(backend, dtype)
    x, weight, _ = _operands(shape, dtype)
    ours = rms_norm(x, weight, EPS, backend=backend)
    _assert_as_good_as_torch(ours, reference.rms_norm(x, weight, EPS), _exact_norm(x, weight))


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_backward(backend, shape, dtype, frozen):
    _skip_if_unsupported(backend, dtype)
    x, weight, grad = _operands(shape, dtype)
    before = grad.clone()
    inputs = [x.requires_grad_()] if frozen else [x.requires_grad_(), weight.requires_grad_()]
    ours = torch.autograd.grad(rms_norm(x, weight, EPS, backend=backend), inputs, grad)
    plain, exact = _plain_grads(grad, x, weight), _exact_grads(grad, x.detach(), weight.detach())
    for i, gradient in enumerate(ours):
        _assert_as_good_as_torch(gradient, plain[i], exact[i])
    torch.testing.assert_close(grad, before, rtol=0, atol=0)


def test_gradient_of_the_weight_alone(backend):
    x, weight, grad = _operands((5, 7), torch.float64)
    y = rms_norm(x, weight.requires_grad_(), EPS, backend=backend)
    (ours,) = torch.autograd.grad(y, weight, grad)
    torch.testing.assert_close(ours, _plain_grads(grad, x, weight)[1])


@pytest.mark.parametrize("shape", [(3, 7), (2, 2, 5), (4, 1)], ids=str)
def test_gradcheck(backend, shape):
    x, weight, _ = _operands(shape, torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS, backend=backend), inputs)


def test_bfloat16_rounds_before_the_weight_as_hugging_face_does(backend):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, _ = _operands((31, 200), torch.bfloat16)
    theirs = LlamaRMSNorm(200, EPS).to(torch.bfloat16).requires_grad_(False)
    theirs.weight.copy_(weight)
    # A statistic that differs in its last bit may move a normalised value across a rounding boundary, rarely.
    equal = rms_norm(x, weight, EPS, backend=backend) == theirs(x)
    assert equal.float().mean() > 0.999


VIEWS = {
    "leading slice": lambda t: t[1:4],
    "inner slice": lambda t: t[:, 2:7],
    "last token": lambda t: t[:, -1],
    "steps": lambda t: t[::2, ::3],
    "row slice of wider": lambda t: t[..., 3:20],
    "every other number": lambda t: t[..., ::2],
    "transposed": lambda t: t.transpose(0, 1),
    "rows transposed": lambda t: t.transpose(1, 2),
    "expanded": lambda t: t[:, :1].expand(-1, 6, -1),
    "three levels": lambda t: t.unflatten(1, (3, 3))[::2, ::2, 1:],
    "numbers expanded": lambda t: t[..., :1].expand(-1, -1, 5),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_x_and_grad(backend, view):
    wide, _, wide_grad = _operands((5, 9, 24), torch.float64)
    x, grad = VIEWS[view](wide), VIEWS[view](wide_grad)
    weight = torch.randn(x.shape[-1], dtype=torch.float64)
    expected = rms_norm(x.contiguous(), weight, EPS, backend=backend)
    torch.testing.assert_close(rms_norm(x, weight, EPS, backend=backend), expected)
    plain = _plain_grads(grad.contiguous(), x.contiguous(), weight)[0]
    for one, other in ((x, grad), (x.contiguous(), grad), (x, grad.contiguous())):
        one = one.detach().requires_grad_()
        (ours,) = torch.autograd.grad(rms_norm(one, weight, EPS, backend=backend), one, other)
        torch.testing.assert_close(ours, plain)


def test_split_rows_are_read_in_place():
    query, key, _ = torch.randn(8, 6, 64).split((4, 2, 2), dim=0)
    for rows in (query, key, key[:, 1:5]):
        assert cpu_launcher._rows(rows)[0] is rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(backend, bad):
    x, weight, grad = _operands((4, 37), torch.float32)
    clean = x.clone().requires_grad_()
    clean_y = rms_norm(clean, weight, EPS, backend=backend)
    (clean_grad,) = torch.autograd.grad(clean_y, clean, grad)
    x[2, 36] = bad
    y = rms_norm(x.requires_grad_(), weight, EPS, backend=backend)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert y[2, 36].isnan()
    assert torch.equal(y[2].isnan(), reference.rms_norm(x, weight, EPS)[2].isnan())
    assert grad_x[2].isnan().all()
    others = [0, 1, 3]
    torch.testing.assert_close(y[others], clean_y[others], rtol=0, atol=0)
    torch.testing.assert_close(grad_x[others], clean_grad[others], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_scale_of_x_cancels_even_where_its_square_is_near_the_limits(backend, size):
    x, weight, grad = _operands((6, 64), torch.float32)
    scaled = (x * size).requires_grad_()
    y = rms_norm(scaled, weight, 0.0, backend=backend)
    torch.testing.assert_close(y, rms_norm(x, weight, 0.0, backend=backend))
    (ours,) = torch.autograd.grad(y, scaled, grad)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(x, weight, 0.0, backend=backend), x, grad)
    torch.testing.assert_close(ours * size, expected, rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_a_bit(backend):
    x, weight, grad = _operands((700, 192), torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        y = rms_norm(leaf, weight, EPS, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("requires_grad", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("view", ["leading slice", "transposed"])
def test_opcheck(backend, requires_grad, view):
    wide, _, _ = _operands((5, 9, 24), torch.float32)
    x = VIEWS[view](wide).requires_grad_(requires_grad[0])
    weight = torch.randn(24).requires_grad_(requires_grad[1])
    torch.library.opcheck(torch.ops.fastcircuit.rms_norm.default, (x, weight, EPS, backend))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_of_the_gradients(backend, needs):
    x, weight, grad = _operands((5, 9, 24), torch.float32)
    torch.library.opcheck(torch.ops.fastcircuit.rms_norm_grads.default, (grad, x, weight, EPS, *needs, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(backend, dynamic):
    def run(x, weight):
        return rms_norm(x * 2, weight, EPS, backend=backend).sin()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((3, 5, 24), (4, 2, 24)):
        x, weight, grad = _operands(shape, torch.float64)
        inputs = (x.requires_grad_(), weight.requires_grad_())
        ours, expected = compiled(*inputs), run(*inputs)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_a_second_derivative_is_refused(backend):
    x, weight, grad = _operands((3, 7), torch.float64)
    y = rms_norm(x.requires_grad_(), weight, EPS, backend=backend)
    (grad_x,) = torch.autograd.grad(y, x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(InputError, match="second derivatives"):
        grad_x.sum().backward()


BAD_CALLS = {
    "shapes": (torch.ones(3, 4), torch.ones(3), "x has shape"),
    "no axis": (torch.ones(()), torch.ones(1), "x has shape"),
    "integers": (torch.ones(3, dtype=torch.int64), torch.ones(3), "accepted are float32"),
    "dtypes": (torch.ones(3), torch.ones(3, dtype=torch.float64), "weight is torch.float64"),
    "devices": (torch.ones(3), torch.ones(3, device="meta"), "weight is on meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_named(name):
    x, weight, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=message):
        rms_norm(x, weight, EPS)


def test_a_backend_that_cannot_says_why():
    half = torch.ones(3, dtype=torch.float16)
    with pytest.raises(InputError, match="kernels have float32"):
        rms_norm(half, half, EPS, backend="cpu")
    assert rms_norm(half, half, 0.0).equal(half)

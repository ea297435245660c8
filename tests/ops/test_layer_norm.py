"""layer_norm against torch's, and the gradient of both norms in place."""

import pytest
import torch
import torch.nn.functional as F

from fastcircuit.errors import InputError
from fastcircuit.ops import layer_norm, norm_backward_, rms_norm

EPS = 1e-5
SHAPES = [(1, 1), (5, 7), (7,), (3, 11, 64), (2, 3, 4, 17), (13, 768), (2, 3, 1030), (0, 8)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _operands(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(*shape) + 3, draw(shape[-1]), draw(shape[-1]), draw(*shape)


def _close(found, expected):
    assert found.is_contiguous()
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected).abs().max()
        assert error <= TOLERANCE[found.dtype] * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward(backend, dtype, shape, with_bias):
    x, weight, bias, _ = _operands(shape, dtype)
    bias = bias if with_bias else None
    wide_bias = None if bias is None else bias.double()
    exact = F.layer_norm(x.double(), shape[-1:], weight.double(), wide_bias, EPS)
    _close(layer_norm(x, weight, bias, EPS, backend=backend), exact)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("centered", [True, False])
def test_gradient_in_place(backend, dtype, shape, centered):
    x, weight, _, grad = _operands(shape, dtype)
    wide = x.double().requires_grad_()
    y = (
        F.layer_norm(wide, shape[-1:], weight.double(), None, EPS)
        if centered
        else F.rms_norm(wide, shape[-1:], weight.double(), EPS)
    )
    (expected,) = torch.autograd.grad(y, wide, grad.double())
    ours = grad.clone()
    assert norm_backward_(ours, x, weight, EPS, centered, backend=backend) is ours
    _close(ours, expected)


def test_far_from_zero(backend):
    x, weight, bias, _ = _operands((13, 768), torch.float32)
    exact = F.layer_norm(x.double() + 1000, (768,), weight.double(), bias.double(), EPS)
    found = layer_norm(x + 1000, weight, bias, EPS, backend=backend)
    assert (found - exact).abs().max() < 1e-3


def test_slices_of_a_larger_tensor(backend):
    wide, weight, bias, _ = _operands((5, 9, 24), torch.float64)
    for x in (wide[1:4], wide[:, 2:7], wide.transpose(0, 1)):
        expected = layer_norm(x.contiguous(), weight, bias, EPS, backend=backend)
        torch.testing.assert_close(layer_norm(x, weight, bias, EPS, backend=backend), expected, rtol=0, atol=0)


def test_gradients_are_recorded_by_torch():
    x, weight, bias, _ = _operands((3, 7), torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *operands: layer_norm(*operands, EPS), inputs)


def test_nan_spoils_its_row_alone(backend):
    x, weight, bias, _ = _operands((4, 37), torch.float32)
    x[2, 36] = torch.nan
    y = layer_norm(x, weight, bias, EPS, backend=backend)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3]].isnan().any()


def test_bad_calls_are_named():
    x, weight, bias, grad = _operands((3, 7), torch.float32)
    with pytest.raises(InputError, match="layer_norm: x has shape"):
        layer_norm(x, weight[:3], bias, EPS)
    with pytest.raises(InputError, match="accepted is contiguous"):
        norm_backward_(grad[:2], x, weight, EPS, True)
    with pytest.raises(InputError, match="kernels have float32"):
        layer_norm(x.half(), weight.half(), bias.half(), EPS, backend="cpu")
    with pytest.raises(InputError, match="rms_norm: weight is"):
        rms_norm(x, weight.double(), EPS)

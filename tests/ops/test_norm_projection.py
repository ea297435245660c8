"""norm_projection and its gradient: every backend and instruction set against float64."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import cpu as cpu_launcher
from fastcircuit.ops import layer_norm, norm_backward_, norm_projection, norm_projection_grad_, rms_norm

EPS = 1e-5
# heads, tokens, d, d_head: odd sizes, one of almost everything, several panels, more tokens than a task has, nothing
SHAPES = [(1, 1, 2, 1), (3, 5, 7, 3), (5, 13, 70, 13), (2, 19, 96, 130), (2, 400, 16, 8), (4, 6, 64, 64), (2, 0, 8, 4)]


def _operands(shape, dtype, of_linear_layer):
    heads, tokens, width, head = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    if of_linear_layer:  # [heads * d_head, d], as in Llama
        weight = draw(heads * head, width).view(heads, head, width).transpose(1, 2)
    else:  # [d, 3 * heads * d_head], as in GPT-2
        weight = draw(width, 3 * heads * head).view(width, 3 * heads, head).permute(1, 0, 2)[heads : 2 * heads]
    reads = draw(heads + 2, tokens, width)[1:-1]
    return reads, draw(width), draw(width), weight, draw(heads, 1, head), draw(heads, tokens, head)


def _exact(x, norm_weight, norm_bias, weight, grad, centered):
    """What the norm and the projection without its bias give in float64, and the gradient of x."""
    x, norm_weight, weight, grad = (tensor.double() for tensor in (x, norm_weight, weight, grad))
    if centered:
        bias = None if norm_bias is None else norm_bias.double()
        normed = layer_norm(x, norm_weight, bias, EPS, backend="reference")
    else:
        normed = rms_norm(x, norm_weight, EPS, backend="reference")
    of_x = norm_backward_(grad @ weight.transpose(1, 2), x, norm_weight, EPS, centered, backend="reference")
    return normed @ weight, of_x


@pytest.mark.parametrize("of_linear_layer", [False, True], ids=["conv1d", "linear"])
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, shape, dtype, centered, of_linear_layer):
    if backend == "triton":
        pytest.skip("there is no Triton kernel for it")
    x, norm_weight, norm_bias, weight, bias, grad = _operands(shape, dtype, of_linear_layer)
    norm_bias = norm_bias if centered else None
    exact, exact_grad = _exact(x, norm_weight, norm_bias, weight, grad, centered)
    y = norm_projection(x, norm_weight, norm_bias, EPS, weight, bias, centered=centered, backend=backend)
    grad_x = torch.empty(x.shape, dtype=dtype)
    norm_projection_grad_(grad, x, norm_weight, EPS, weight, grad_x, centered=centered, backend=backend)
    tolerance = torch.finfo(dtype).eps * 40
    for ours, truth in ((y, exact + bias.double()), (grad_x, exact_grad)):
        assert ours.dtype == dtype
        if ours.numel():
            assert (ours.double() - truth).abs().max() <= tolerance * max(truth.abs().max(), 1.0)


def test_without_a_bias_and_for_large_gradients(backend):
    if backend == "triton":
        pytest.skip("there is no Triton kernel for it")
    x, norm_weight, _, weight, _, grad = _operands((9, 130, 1024, 16), torch.float32, True)
    exact, exact_grad = _exact(x, norm_weight, None, weight, grad, False)
    y = norm_projection(x, norm_weight, None, EPS, weight, None, centered=False, backend=backend)
    grad_x = torch.empty(x.shape)
    norm_projection_grad_(grad, x, norm_weight, EPS, weight, grad_x, centered=False, backend=backend)
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad_x, exact_grad.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_threads_gives_the_same_bits(threads):
    if cpu_launcher.missing_reason() is not None:
        pytest.skip("there are no C++ kernels")
    x, norm_weight, norm_bias, weight, bias, grad = _operands((2, 400, 16, 8), torch.float32, False)
    results = []
    was = torch.get_num_threads()
    for count in (threads, 2):
        torch.set_num_threads(count)
        try:
            y = norm_projection(x, norm_weight, norm_bias, EPS, weight, bias, centered=True, backend="cpu")
            grad_x = torch.empty(x.shape)
            norm_projection_grad_(grad, x, norm_weight, EPS, weight, grad_x, centered=True, backend="cpu")
        finally:
            torch.set_num_threads(was)
        results.append((y, grad_x))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_heads_too_large_for_the_cache_are_left_to_matrix_products():
    x, weight = torch.ones(1, 1, 4096), torch.ones(1, 4096, 128)
    assert any("a head's weights" in reason for reason in cpu_launcher.unsupported("norm_projection", x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, "heads, T, d"),
        ({"weight": torch.ones(2, 5, 3)}, "heads, T, d"),
        ({"norm_weight": torch.ones(5)}, "norm_weight"),
        ({"norm_weight": torch.ones(4).double()}, "norm_weight is torch.float64"),
        ({"bias": torch.ones(2, 3)}, "bias has shape"),
        ({"centered": False}, "RMSNorm"),
    ],
)
def test_wrong_operands_are_one_clear_line(change, message):
    given = {
        "x": torch.ones(2, 6, 4),
        "norm_weight": torch.ones(4),
        "norm_bias": torch.ones(4),
        "eps": EPS,
        "weight": torch.ones(2, 4, 3),
        "bias": torch.ones(2, 1, 3),
        "centered": True,
    }
    with pytest.raises(InputError, match=message):
        norm_projection(**(given | change))


def test_gradients_of_the_wrong_shape_are_refused():
    x, weight = torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    for grad, grad_x in ((torch.ones(2, 6, 4), torch.ones(2, 6, 4)), (torch.ones(2, 6, 3), torch.ones(2, 6, 3))):
        with pytest.raises(InputError, match="accepted is"):
            norm_projection_grad_(grad, x, torch.ones(4), EPS, weight, grad_x, centered=True)

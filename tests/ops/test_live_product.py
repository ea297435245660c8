"""live_product and its gradient: every backend against float64, with NaN in whatever must not be read."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import live_product, live_product_
from fastcircuit.ops import triton as triton_launcher
from fastcircuit.ops.live_product import pays
from tests.ops.conftest import usable_backends

# groups, rows, inner, columns; more than a tile in every direction, primes, ones, nothing
SHAPES = [(3, 70, 37, 67), (5, 3, 18, 7), (1, 1, 1, 1), (2, 5, 0, 3), (0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 4, 0)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[name for name in usable_backends() if name != "cpu"])
def backend(request):
    """There is no C++ kernel for it."""
    return request.param


def _operands(shape, dtype, layout="rows"):
    """x, weight and bias, the first two cut from bigger tensors; flags of which the second and third are 0."""
    groups, rows, inner, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x = draw(groups, rows + 2, inner + 3)[:, 1 : rows + 1, 2 : inner + 2]
    weight = {
        "rows": lambda: draw(groups, inner, columns + 1)[:, :, :columns],
        "columns": lambda: draw(groups, columns, inner + 1)[:, :, :inner].transpose(1, 2),
        "heads last": lambda: draw(inner, columns, groups).permute(2, 0, 1),
    }[layout]()
    alive = (torch.arange(groups) % 3 != 1).int() * 5
    return x, weight, draw(groups, 1, columns), alive


def _exact(x, weight, bias=None):
    product = torch.bmm(x.double(), weight.double())
    return product if bias is None else product + bias.double()


def _check_close(ours, plain, exact):
    """Error against float64 at most twice that of plain torch in the same dtype, plus a rounding step."""
    assert ours.dtype == plain.dtype
    assert not ours.isnan().any()
    if ours.numel():
        # float64 has only itself, with its own roundings, as a judge.
        steps = 16 if ours.dtype == torch.float64 else 1
        step = steps * torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + step


def _poison(*of_groups, dead):
    for tensor in of_groups:
        tensor[dead] = torch.nan


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_and_their_gradients(backend, shape, dtype, layout):
    x, weight, bias, alive = _operands(shape, dtype, layout)
    grad = torch.randn(shape[0], shape[1], shape[3], dtype=torch.float64).to(dtype)
    on, dead = alive != 0, alive == 0
    plain, exact = torch.baddbmm(bias, x, weight), _exact(x, weight, bias)
    plain_grad, exact_grad = torch.bmm(grad, weight.transpose(1, 2)), _exact(grad, weight.transpose(1, 2))
    _poison(x, weight, bias, grad, dead=dead)
    leaf = x.detach().requires_grad_()
    ours = live_product(leaf, weight, bias, alive, backend=backend)
    _check_close(ours.detach()[on], plain[on], exact[on])
    assert not ours[dead].any()
    (ours_grad,) = torch.autograd.grad(ours, leaf, grad)
    _check_close(ours_grad[on], plain_grad[on], exact_grad[on])
    assert not ours_grad[dead].any()


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("layout", ["rows", "columns", "heads last"])
def test_written_where_it_is_wanted(backend, zeros, layout):
    """Results of heads side by side, as attention has them; what is not written stays."""
    x, weight, _, alive = _operands((5, 66, 18, 7), torch.float32, layout)
    on, dead = alive != 0, alive == 0
    exact = _exact(x, weight)
    buffer = torch.full((70, 5, 9), 3.0)
    out = buffer[2:68, :, 1:8].transpose(0, 1)
    _poison(x, weight, dead=dead)
    live_product_(out, x, weight, None, alive, zeros=zeros, backend=backend)
    torch.testing.assert_close(out[on].double(), exact[on], rtol=0, atol=1e-5)
    assert out[dead].eq(0 if zeros else 3).all()
    for untouched in (buffer[:2], buffer[68:], buffer[:, :, :1], buffer[:, :, 8:]):
        assert untouched.eq(3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_what_else_is_alive(backend, dtype):
    x, weight, bias, alive = _operands((6, 66, 37, 20), dtype)
    some, on = live_product(x, weight, bias, alive, zeros=False, backend=backend), alive != 0
    every = live_product(x, weight, bias, torch.ones_like(alive), backend=backend)
    assert torch.equal(some[on], every[on])


def test_without_zeros_other_gradients_are_the_same(backend):
    x, weight, bias, alive = _operands((4, 5, 6, 7), torch.float32)
    grads, grad = [], torch.randn(4, 5, 7)
    for zeros in (True, False):
        leaf = x.detach().requires_grad_()
        out = live_product(leaf, weight, bias, alive, zeros=zeros, backend=backend)
        grads.append(torch.autograd.grad(out, leaf, grad)[0][alive != 0])
    assert torch.equal(*grads)


def test_one_input_for_all_groups(backend):
    x, weight, bias, alive = _operands((4, 5, 6, 7), torch.float64)
    shared = x[:1].detach().requires_grad_()
    ours = live_product(shared.expand(4, -1, -1), weight, bias, alive, backend=backend)
    exact = torch.where(alive[:, None, None] != 0, _exact(shared.expand(4, -1, -1), weight, bias), 0)
    torch.testing.assert_close(ours, exact)
    (ours_grad,) = torch.autograd.grad(ours.sum(), shared, retain_graph=True)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(exact.sum(), shared)[0])


def test_gradcheck(backend):
    x, weight, bias, alive = _operands((3, 2, 3, 2), torch.float64)
    run = lambda leaf: live_product(leaf, weight, bias, alive, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, x.detach().requires_grad_())


def test_opcheck(backend):
    x, weight, bias, alive = _operands((3, 4, 5, 6), torch.float32)
    op, leaf = torch.ops.fastcircuit, x.detach().requires_grad_()
    torch.library.opcheck(op.live_product.default, (leaf, weight, bias, alive, True, backend))
    torch.library.opcheck(op.live_product.default, (x, weight, None, torch.ones_like(alive), False, backend))
    out = torch.zeros(3, 4, 6)
    torch.library.opcheck(op.live_product_.default, (out, x, weight, bias, alive, False, backend))


def test_compiled_equals_eager(backend):
    x, weight, bias, alive = _operands((3, 4, 5, 6), torch.float32)

    def loss(leaf):
        return live_product(leaf * 2, weight, bias, alive, backend=backend).sin().sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.detach().requires_grad_()
        value = run(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("tokens", "inner", "columns", "dtype", "expected"),
    [
        (2048, 768, 64, torch.bfloat16, True),  # a head of GPT-2 small
        (2048, 64, 768, torch.float16, True),
        (2048, 768, 3072, torch.bfloat16, False),  # its MLP
        (32, 768, 3072, torch.bfloat16, True),  # at the answers
        (256, 5120, 128, torch.bfloat16, True),  # a 13B Llama
        (256, 5120, 13824, torch.bfloat16, True),
        (2048, 768, 64, torch.float32, False),  # on vector units
        (2048, 768, 64, torch.float64, False),
    ],
)
def test_it_pays_where_products_wait_for_memory(tokens, inner, columns, dtype, expected):
    x = torch.empty(3, tokens, inner, dtype=dtype, device="meta")
    assert pays(x, torch.empty(3, inner, columns, dtype=dtype, device="meta")) == expected


def test_tf32_pays_for_heads():
    x, weight = (torch.empty(1, *shape, device="meta") for shape in ((2048, 768), (768, 64)))
    triton_launcher.force_float32_precision("tf32")
    try:
        assert pays(x, weight)
    finally:
        triton_launcher.force_float32_precision(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(2, 3, 5)}, r"x has shape \[2, 3, 4\] and weight \[2, 3, 5\]; accepted are \[G, M, K\]"),
        ({"weight": torch.ones(2, 4, 5).double()}, r"weight is torch\.float64 on cpu; accepted is torch\.float32"),
        ({"weight": torch.ones(2, 4, 5, requires_grad=True)}, "weight requires grad; only x has a gradient"),
        ({"bias": torch.ones(2, 5)}, r"bias has shape \[2, 5\]; accepted is \[2, 1, 5\], or None"),
        ({"alive": torch.ones(2)}, r"alive is torch\.float32 \[2\] on cpu; accepted is int32 \[2\] on cpu"),
        ({"alive": torch.ones(3, dtype=torch.int32)}, r"alive is torch\.int32 \[3\]"),
        ({"backend": "cpu"}, "it has no live_product_"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(change, message):
    arguments = {"x": torch.ones(2, 3, 4), "weight": torch.ones(2, 4, 5), "bias": None}
    arguments |= {"alive": torch.ones(2, dtype=torch.int32), **change}
    with pytest.raises(InputError, match=message):
        live_product(**arguments)


@pytest.mark.parametrize("out", [torch.ones(2, 3, 4), torch.ones(2, 3, 5).double(), torch.ones(2, 5, 3).mT])
def test_what_is_written_into_must_fit(out):
    x, weight, alive = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"out is .* accepted is torch\.float32 \[2, 3, 5\] with contiguous rows"):
        live_product_(out, x, weight, None, alive)

"""hard_concrete: the generator against published values, every backend against float64 and the closed forms."""

import pytest
import torch

from fastcircuit import masks
from fastcircuit.errors import InputError
from fastcircuit.ops import hard_concrete, reference

NUMBERS = {"temperature": masks.TEMPERATURE, "stretch": masks.STRETCH, "epsilon": masks.EPSILON}
# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture(autouse=True)
def _not_on_the_cpu_kernels(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cpu":
        pytest.skip("there is no C++ kernel for it")


def _draw(log_alpha, seed=3, draw=0, backend="reference"):
    return hard_concrete(log_alpha, torch.tensor([seed, draw]), **NUMBERS, backend=backend)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_is_philox(counter, key, expected):
    low, high = (int(word, 16) for word in key.split())
    signed = (high << 32 | low) - (2**64 if high >> 31 else 0)
    words = reference.philox(torch.tensor(signed), tuple(torch.tensor([int(word, 16)]) for word in counter.split()))
    assert [f"{int(word):08x}" for word in words] == expected.split()


@pytest.mark.parametrize("seed", [(0, 0), (2**62 + 12345, 2**40 + 7), (-1, 2**63 - 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 1021])
def test_every_backend_draws_the_same(backend, seed, dtype, size):
    log_alpha = torch.linspace(-6, 6, size, dtype=torch.float64).to(dtype)
    ours = _draw(log_alpha, *seed, backend=backend)
    exact = _draw(log_alpha.double(), *seed)
    # Beside 2 for the logarithms and exponentials: a sigmoid's slope is at most 1/4, and ln u reaches 14.
    step = torch.finfo(dtype).eps * 14 * 1.2 / masks.TEMPERATURE
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=step)


def test_the_distribution_is_hard_concrete(backend):
    size = 20_000
    for level in (-3.0, 0.0, 1.5):
        log_alpha = torch.full((size,), level, dtype=torch.float64)
        z, on = _draw(log_alpha, backend=backend)
        off = masks.probability_of_zero(log_alpha[:1])
        torch.testing.assert_close(on[:1], 1 - off)
        # By the quantiles of the definition: those of z are those of u.
        uniform = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        quantiles = masks.sample_at(log_alpha, uniform)
        # Dvoretzky-Kiefer-Wolfowitz: a larger distance has probability 2 exp(-2 * 5.2) < 1e-4.
        grid = torch.linspace(0, 1, 201, dtype=torch.float64)
        ours, expected = (torch.searchsorted(v.sort().values, grid, right=True) / size for v in (z, quantiles))
        assert (ours - expected).abs().max() < (5.2 / size) ** 0.5


def test_draws_are_different_and_repeatable(backend):
    log_alpha = torch.zeros(500, dtype=torch.float64)
    first = _draw(log_alpha, 1, 0, backend)[0]
    assert torch.equal(first, _draw(log_alpha, 1, 0, backend)[0])
    for seed, draw in ((1, 1), (2, 0), (1, 2**32), (1 + 2**32, 0)):
        other = _draw(log_alpha, seed, draw, backend)[0]
        assert (first == other).double().mean() < 0.5  # only where both are clamped: 2 * 0.18^2
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert correlation.abs() < 5 / 500**0.5


def test_gradients_are_those_of_the_definition(backend):
    log_alpha = torch.linspace(-4, 4, 999, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 999, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, on = _draw(log_alpha, backend=backend)
    (ours,) = torch.autograd.grad((z * weights[0] + on * weights[1]).sum(), log_alpha)
    # The uniform number back from an unclamped sample of level 0 (each draw is the same whatever the level).
    words = reference.philox(torch.tensor(3), (torch.arange(999), *torch.zeros(3, 999, dtype=torch.int64)))
    uniform = masks.EPSILON + (1 - 2 * masks.EPSILON) * ((words[0] >> 9).double() + 0.5) / 2**23
    plain_z, plain_on = masks.sample_at(log_alpha, uniform), 1 - masks.probability_of_zero(log_alpha)
    torch.testing.assert_close((z, on), (plain_z, plain_on))
    (expected,) = torch.autograd.grad((plain_z * weights[0] + plain_on * weights[1]).sum(), log_alpha)
    torch.testing.assert_close(ours, expected)
    clamped = (z == 0) | (z == 1)
    assert 0 < clamped.sum() < 999
    (through_z,) = torch.autograd.grad(_draw(log_alpha, backend=backend)[0].sum(), log_alpha)
    assert not through_z[clamped].any()
    assert through_z[~clamped].all()


def test_opcheck(backend):
    log_alpha, seed = torch.linspace(-3, 3, 50, requires_grad=True), torch.tensor([1, 2])
    numbers = (masks.TEMPERATURE, *masks.STRETCH)
    op = torch.ops.fastcircuit
    torch.library.opcheck(op.hard_concrete.default, (log_alpha, seed, *numbers, masks.EPSILON, backend))
    grads = [torch.rand(50) for _ in range(4)]
    torch.library.opcheck(op.hard_concrete_grad.default, (*grads, *numbers, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_alpha": torch.ones(2, 3)}, r"log_alpha is torch\.float32 \[2, 3\]; accepted is \[n\]"),
        ({"log_alpha": torch.ones(2).half()}, "accepted is .* float32 or float64"),
        ({"seed": torch.ones(2)}, r"seed is torch\.float32 \[2\] on cpu; accepted is int64 \[2\]"),
        ({"stretch": (0.0, 1.1)}, "accepted are low < 0 and high > 1"),
        ({"backend": "cpu"}, "it has no hard_concrete"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(change, message):
    arguments = {"log_alpha": torch.ones(4), "seed": torch.tensor([0, 0]), **NUMBERS, **change}
    with pytest.raises(InputError, match=message):
        hard_concrete(**arguments)

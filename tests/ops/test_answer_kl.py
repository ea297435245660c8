"""answer_kl and its gradient: every backend against float64, in which torch's own kl_div is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from fastcircuit.errors import InputError
from fastcircuit.ops import answer_kl, reference

# rows, vocabulary, width
SHAPES = [(1, 1, 1), (5, 131, 17), (33, 300, 40), (2, 257, 64), (0, 7, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _not_on_the_cpu_kernels(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cpu":
        pytest.skip("there is no C++ kernel for it")


def _operands(shape, dtype, level=0.0):
    rows, words, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = draw(rows, width).to(dtype), (draw(words, width) / width**0.5).to(dtype)
    hidden[:, :1] += level
    log_probs = (2 * draw(rows, words)).log_softmax(-1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return hidden, weight, log_probs, draw(rows).to(log_probs.dtype)


def _kl(hidden, weight, log_probs):
    return F.kl_div((hidden @ weight.T).log_softmax(-1), log_probs, reduction="none", log_target=True).sum(-1)


def _with_gradient(run, hidden, weight, log_probs, grad):
    hidden = hidden.detach().clone().requires_grad_()
    kl = run(hidden, weight, log_probs)
    return kl.detach(), torch.autograd.grad(kl, hidden, grad)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_and_gradient(backend, shape, dtype):
    operands = _operands(shape, dtype)
    ours = _with_gradient(lambda *ts: answer_kl(*ts, backend=backend), *operands)
    exact = _with_gradient(_kl, *(tensor.double() for tensor in operands))
    # Plain torch in this dtype keeps its logits in it; sums of ours are at least float32.
    plain = _with_gradient(lambda h, w, p: _kl(h.to(p.dtype), w.to(p.dtype), p), *operands)
    for found, close, expected in zip(ours, plain, exact, strict=True):
        assert found.shape == expected.shape
        assert not found.isnan().any()
        if found.numel():
            # What is summed is as large as a logarithm of a probability; float64 has only itself to be judged by. The
            # gradient of the logits is rounded to the dtype on its way: one more step.
            step = torch.finfo(found.dtype).eps * float(operands[2].abs().max().clamp(min=1))
            assert (found - expected).abs().max() <= 2 * (close - expected).abs().max() + 2 * step


def test_the_dtypes(backend):
    for dtype in DTYPES:
        hidden, weight, log_probs, grad = _operands((3, 9, 5), dtype)
        kl, grad_hidden = _with_gradient(lambda *ts: answer_kl(*ts, backend=backend), hidden, weight, log_probs, grad)
        assert (kl.dtype, grad_hidden.dtype) == (log_probs.dtype, dtype)


def test_gradcheck(backend):
    hidden, weight, log_probs, _ = _operands((3, 11, 5), torch.float64)
    run = lambda h: answer_kl(h, weight, log_probs, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, hidden.requires_grad_())


def test_a_divergence_of_zero_far_from_zero_logits(backend):
    """Logits near -1000: what is left of ln q after its level is taken off must be exact enough."""
    hidden, weight, _, grad = _operands((4, 200, 8), torch.float32)
    weight[:, 0] = -1000.0
    hidden[:, 0] = 1.0
    log_probs = (hidden.double() @ weight.double().T).log_softmax(-1).float()
    kl, grad_hidden = _with_gradient(lambda *ts: answer_kl(*ts, backend=backend), hidden, weight, log_probs, grad)
    # One rounding step of such a logit is 1000 * 2^-24; the divergence is of second order in it, its sum is not.
    step = 1000 * torch.finfo(torch.float32).eps
    assert kl.abs().max() <= step
    # Changes of ln q of that size change the gradient by as much, times the weight that all words share.
    assert grad_hidden[:, 1:].abs().max() <= 4 * step * weight[:, 1:].abs().max() * grad.abs().max()


def test_words_without_probability_and_shares_of_one(backend):
    """A reference that is restricted, or that sums to less than one, as a part of the vocabulary does."""
    hidden, weight, log_probs, grad = _operands((3, 140, 6), torch.float64)
    log_probs[:, ::2] = -torch.inf
    log_probs[:, 1::4] -= 0.7
    kl, ours = _with_gradient(lambda *ts: answer_kl(*ts, backend=backend), hidden, weight, log_probs, grad)
    kept = hidden.clone().requires_grad_()
    log_q = (kept @ weight.T).log_softmax(-1)[:, 1::2]
    expected = (log_probs[:, 1::2].exp() * (log_probs[:, 1::2] - log_q)).sum(-1)
    torch.testing.assert_close(kl, expected.detach())
    torch.testing.assert_close(ours, torch.autograd.grad(expected, kept, grad)[0])


def test_strided_operands(backend):
    hidden, weight, log_probs, _ = _operands((5, 20, 12), torch.float64)
    expected = answer_kl(hidden[::2, 1:9].contiguous(), weight[:, 1:9].contiguous(), log_probs[::2].contiguous())
    ours = answer_kl(hidden[::2, 1:9], weight.T.contiguous().T[:, 1:9], log_probs[::2], backend=backend)
    torch.testing.assert_close(ours, expected)


def test_opcheck(backend):
    hidden, weight, log_probs, grad = _operands((3, 11, 5), torch.float32)
    op = torch.ops.fastcircuit
    torch.library.opcheck(op.answer_kl.default, (hidden.clone().requires_grad_(), weight, log_probs, backend))
    stats = reference.answer_kl(hidden, weight, log_probs)[1]
    torch.library.opcheck(op.answer_kl_grad.default, (grad, hidden, weight, log_probs, stats, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7, 4)}, r"hidden has shape \[2, 3\] and weight \[7, 4\]"),
        ({"weight": torch.ones(7, 3).half()}, r"weight torch\.float16; accepted is one of float32"),
        ({"reference_log_probs": torch.ones(2, 6)}, r"is torch\.float32 \[2, 6\]; accepted is torch\.float32 \[2, 7\]"),
        ({"weight": torch.ones(7, 3, requires_grad=True)}, "only hidden has a gradient"),
        ({"weight": torch.ones(7, 3, device="meta")}, "accepted is one device"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(change, message):
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(7, 3), "reference_log_probs": torch.ones(2, 7)}
    with pytest.raises(InputError, match=message):
        answer_kl(**{**arguments, **change})

"""Which MLPs run in a kernel, and that those with hooks, other parts or recorded gradients do not."""

import pytest
import torch
from torch import nn

from fastcircuit.models.masked import ARCHITECTURES, MaskedCausalLM
from fastcircuit.models.mlp import Mlp
from fastcircuit.ops import cpu, extension
from tests.models.test_masked import pair, random_masks
from tests.models.tiny import TINY, tiny_model

pytestmark = pytest.mark.skipif(extension.missing_reason() is not None, reason="there are no C++ kernels")


def _first_block(model):
    return ARCHITECTURES[model.config.model_type](model.requires_grad_(False)).blocks[0]


def _module(model):
    layers = getattr(model, "transformer", getattr(model, "model", model))
    return next(part for name, part in layers.named_modules() if name.endswith(".mlp"))


@pytest.mark.parametrize("name", TINY)
def test_by_hand_is_what_hugging_face_computes(name):
    model = tiny_model(name)
    mlp, x = _first_block(model).mlp, torch.randn(7, 24, dtype=torch.float64)
    assert mlp.runs_by_hand(x)
    leaf = x.clone().requires_grad_()
    expected = _module(model)(leaf)
    out, slopes = mlp.forward(x, keep=True)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(mlp(x.view(1, 7, 24)), expected.detach()[None])
    grad = torch.randn_like(x)
    expected.backward(grad)
    torch.testing.assert_close(mlp.backward(grad, slopes), leaf.grad)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_on_plain_torch_calls_no_kernel(name, monkeypatch):
    called = []
    for op in ("mlp", "mlp_grad", "norm_projection", "norm_projection_grad_", "masked_read"):
        kernel = getattr(cpu, op)
        monkeypatch.setattr(cpu, op, lambda *args, op=op, kernel=kernel, **kwargs: called.append(op) or kernel(*args))
    found = {}
    for backend in ("reference", "cpu"):
        model = MaskedCausalLM(tiny_model(name), backend=backend)
        masks = random_masks(model.graph)
        clean, corrupted = pair()
        logits = model(clean, corrupted_input_ids=corrupted, masks=masks).logits
        logits.square().sum().backward()
        found[backend] = sorted(set(called))
        called.clear()
    assert found["reference"] == []
    assert found["cpu"] == ["masked_read", "mlp", "mlp_grad", "norm_projection", "norm_projection_grad_"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_hook_is_not_bypassed(name):
    model = tiny_model(name)
    mlp, x = _first_block(model).mlp, torch.randn(7, 24, dtype=torch.float64)
    plain, module = mlp(x), _module(model)
    last = module.c_proj if name == "gpt2" else module
    handle = last.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert not mlp.runs_by_hand(x)
    assert not mlp(x).any()
    handle.remove()
    torch.testing.assert_close(mlp(x), plain)


def test_other_parts_are_left_to_the_model():
    model = tiny_model("llama")
    _module(model).act_fn = nn.Tanh()
    mlp, x = _first_block(model).mlp, torch.randn(7, 24, dtype=torch.float64)
    assert not mlp.runs_by_hand(x)
    torch.testing.assert_close(mlp(x), _module(model)(x))

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama")
    _module(model).up_proj.__class__ = Scaled
    assert _first_block(model).mlp.parts is None


def test_recorded_gradients_are_autograds():
    mlp = _first_block(tiny_model("llama")).mlp
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    assert mlp(x).requires_grad
    assert Mlp(torch.tanh)(x).requires_grad

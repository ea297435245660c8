"""An MLP in its parts is the model's own, in every architecture; and whom a gate is for."""

import pytest
import torch

from fastcircuit.models.gate import Gate
from fastcircuit.models.masked import MaskedCausalLM
from tests.models.tiny import TINY, tiny_model


@pytest.mark.parametrize("name", TINY)
def test_the_parts_of_an_mlp_are_the_whole(name, monkeypatch):
    monkeypatch.setattr(Gate, "closes", lambda self, x, weight: True)
    model = MaskedCausalLM(tiny_model(name))
    gate = Gate(torch.ones(1, dtype=torch.int32), "reference")
    for block in model.anatomy.blocks:
        x = torch.randn(7, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
        outs = block.mlp(x), block.mlp(x, gate)
        torch.testing.assert_close(*outs)
        grad = torch.randn_like(outs[0])
        torch.testing.assert_close(*(torch.autograd.grad(out, x, grad) for out in outs))


def test_a_gate_of_readers_is_cut_into_those_of_projections():
    first, second = Gate(torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32), "triton", True).split([3, 1])
    assert (first.alive.tolist(), second.alive.tolist()) == ([1, 0, 1], [1])
    assert (first.backend, first.always) == ("triton", True)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_gate_does_not_close_without_a_kernel(backend):
    x, weight = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    for always in (None, True):
        assert not Gate(torch.ones(2, dtype=torch.int32), backend, always).closes(x, weight)

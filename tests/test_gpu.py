"""What must hold on a CUDA device as on the CPU; skipped, visibly, without one."""

import pytest
import torch

from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.ops import masked_read, masked_read_backward_
from tests.models.test_masked import pair
from tests.models.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (36, 26, 64, 768), (5, 13, 11, 17), (1, 30, 13, 64), (120, 41, 8, 512)]
)
def test_masked_read_equals_float64_on_the_cpu(shape, backend):
    readers, writers, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    stream, grad = (torch.randn(n, tokens, width, generator=generator, dtype=torch.float64) for n in (writers, readers))
    mask = torch.rand(readers, writers, generator=generator, dtype=torch.float64)
    own = [tensor.float().cuda() for tensor in (stream, mask, grad)]
    reads = masked_read(own[0], own[1], backend=backend)
    grad_stream = torch.zeros_like(own[0])
    grad_mask = masked_read_backward_(own[2], own[0], own[1], grad_stream, backend=backend)
    expected_stream = torch.zeros_like(stream)
    expected_mask = masked_read_backward_(grad, stream, mask, expected_stream, backend="reference")
    for found, expected in (
        (reads, masked_read(stream, mask, backend="reference")),
        (grad_stream, expected_stream),
        (grad_mask, expected_mask),
    ):
        error = (found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < 1e-3  # float32 lands under 1e-5; TF32 products, where allowed, near 3e-4


@pytest.mark.parametrize("name", ["gpt2", "llama-biases-head-dim", "mistral-window"])
def test_masked_models_equal_the_cpu(name):
    results = []
    for device in ("cpu", "cuda"):
        model = MaskedCausalLM(tiny_model(name, torch.float32).to(device))
        clean, corrupted = pair()
        edge = torch.rand(model.graph.num_edges, generator=torch.Generator().manual_seed(1))
        masks = Masks(edge.to(device).requires_grad_())
        logits = model(clean, corrupted_input_ids=corrupted, masks=masks).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), masks.edge)
        results.append((logits.cpu(), gradient.cpu()))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-2

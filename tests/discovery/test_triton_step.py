"""A whole step on the Triton kernels, in Triton's interpreter: the step of the other backends, skipping included."""

import dataclasses
import os

import numpy as np
import pytest
import torch

from fastcircuit.discovery import Settings, static_step
from fastcircuit.discovery.buckets import Bucket
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.static_step import StaticStep
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models import stream
from fastcircuit.models.inputs import FusedReads
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.ops import triton as triton_launcher
from tests.discovery.test_edge_pruning import make_task
from tests.discovery.test_steppers import filled
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not in its interpreter")

# At this level a fifth of the masks is 0, and about as many are 1.
SETTINGS = Settings(steps=4, batch_size=3, learning_rate=0.5, learning_rate_warmup=1, initial_log_alpha=0.5)


def stepped(name, backend, changes=None, nodes="split", recompute=None):
    """The gradient by every edge's mask and the state after a step, in float32, of two examples in micro-batches."""
    model = MaskedCausalLM(tiny_model(name, torch.float32), nodes, backend=backend)
    settings = dataclasses.replace(SETTINGS, **(changes or {}))
    reference = Reference(model, make_task().split("train"), settings.ablation)
    run = EdgePruning(reference, 40, settings, execution=Execution("fixed", recompute=recompute))
    # The same numbers in every backend: those that the kernel draws.
    run.parameters.backend = run.parameters.backend or "reference"
    static = StaticStep(reference, run.parameters, run.parameters.optimizer(on_device=True), recompute)
    static.begin()
    for indices in (torch.tensor([2]), torch.tensor([7])):
        static.accumulate(filled(reference, Bucket.of(reference, indices, 1), indices))
    static.finish()
    return static


def assert_same(found, expected, tolerance=2e-4):
    assert found.parameters.backend != expected.parameters.backend
    torch.testing.assert_close(found.product, expected.product, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.kl, expected.kl, rtol=tolerance, atol=1e-6)
    open_masks = (expected.product > 0) & (expected.product < 1)
    assert 0.2 < open_masks.float().mean() < 0.9
    gradients = found.gradient[open_masks], expected.gradient[open_masks]
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()
    torch.testing.assert_close(found.history[0], expected.history[0], rtol=tolerance, atol=1e-6)
    for own, other in zip(found.parameters.parameters(), expected.parameters.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "nodes", "recompute"),
    [
        ("gpt2", {}, "split", None),
        ("llama", {"node_target": 0.5, "sparsity_estimate": "expected"}, "none", True),
        ("llama-biases-head-dim", {"node_masks": False, "ablation": "mean"}, "joint", None),
    ],
)
def test_a_step_on_triton_is_the_step_of_the_cpu(name, changes, nodes, recompute, monkeypatch):
    used = []
    whole = FusedReads.backward_
    monkeypatch.setattr(FusedReads, "backward_", lambda self, grad: used.append(self.live) or whole(self, grad))
    found = stepped(name, "triton", changes, nodes, recompute)
    assert len(used) == 2 * 3 * 2  # heads and MLP of every layer, of both micro-batches
    assert all(live is not None for live in used)
    used.clear()
    assert_same(found, stepped(name, "auto", changes, nodes, recompute))
    assert not used


def test_what_triton_leaves_out_changes_nothing(monkeypatch):
    """At a third of the masks on, writers are skipped in every layer, and heads that nothing reads do not read."""
    sparse = {"initial_log_alpha": -1.5}
    skipping = stepped("gpt2", "triton", sparse)
    monkeypatch.setattr(stream, "Alive", lambda *anything: None)
    monkeypatch.setattr(static_step, "without_dead_ends", lambda graph, product: product)
    whole = stepped("gpt2", "triton", sparse)
    assert (whole.product != skipping.product).any()
    torch.testing.assert_close(skipping.kl, whole.kl, rtol=1e-6, atol=0)  # sums in another order
    open_masks = (skipping.product > 0) & (skipping.product < 1)
    torch.testing.assert_close(skipping.gradient[open_masks], whole.gradient[open_masks], rtol=1e-3, atol=1e-6)
    dead = (skipping.product == 0) & (whole.product != 0)
    assert not skipping.gradient[dead].any()
    assert not whole.gradient[dead].any()  # exactly


def test_inputs_that_are_too_large_to_be_made_together(monkeypatch):
    expected = stepped("llama", "triton")
    monkeypatch.setattr(stream, "TOGETHER_BYTES", 0)
    found = stepped("llama", "triton")
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-3, atol=1e-6)


DEAD = {
    "heads and MLPs": lambda graph: [graph.head_writer(0, 1), *heads(graph, 1)[2:], graph.mlp_writer(0)],
    "a layer": lambda graph: [*heads(graph, 1), graph.mlp_writer(1), graph.mlp_writer(2)],
    "everything": lambda graph: range(graph.num_writers),
}


def heads(graph, layer):
    return list(range(graph.head_writer(layer), graph.mlp_writer(layer)))


@pytest.fixture
def _nan_in_fresh_memory():
    """So that what is left out and yet read is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_fresh_memory")
@pytest.mark.parametrize(
    ("name", "recompute", "dead"),
    [
        ("gpt2", False, "heads and MLPs"),
        ("gpt2", False, "everything"),
        ("llama", True, "a layer"),
        ("tracr", False, "heads and MLPs"),
    ],
)
def test_what_is_left_out_of_dead_heads_and_mlps_changes_nothing(name, recompute, dead, monkeypatch):
    """Attention, projections, MLPs; float64 is the truth."""
    run = lambda dtype, backend: gradient_with(name, DEAD[dead], dtype, backend, recompute)  # noqa: E731
    skipping, exact = run(torch.float32, "triton"), run(torch.float64, "reference")
    with monkeypatch.context() as patched:
        patched.setattr(triton_launcher, "live_product_", of_all_groups(triton_launcher.live_product_))
        multiplied = run(torch.float32, "triton")
    monkeypatch.setattr(stream, "Alive", lambda *anything: None)
    whole = run(torch.float32, "triton")
    open_masks = (exact[2] > 0) & (exact[2] < 1)
    for found in (skipping, whole):
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-4, atol=1e-7)
        difference = (found[1].double() - exact[1])[open_masks]
        assert difference.norm() <= 2e-4 * exact[1][open_masks].norm()
    torch.testing.assert_close(skipping[0], whole[0], rtol=0, atol=ONE_ROUNDING)
    assert not skipping[1][~open_masks].any()
    # The same kernels whether or not they skip: bit for bit.
    assert torch.equal(skipping[0], multiplied[0])
    assert torch.equal(skipping[1], multiplied[1])


# Sums in another order: a rounding step of log-probabilities, which are about -4.
ONE_ROUNDING = 4 * torch.finfo(torch.float32).eps


def of_all_groups(launch):
    """Products of all groups, whatever their flags."""
    return lambda out, x, weight, bias, alive, zeros: launch(out, x, weight, bias, torch.ones_like(alive), zeros)


@pytest.mark.parametrize(("name", "of_mlp", "again"), [("gpt2", 2, False), ("llama", 3, True)])
def test_every_product_of_heads_and_mlps_asks_who_is_alive(name, of_mlp, again, monkeypatch):
    dead, calls, launch = DEAD["heads and MLPs"], [], triton_launcher.live_product_

    def noted(out, x, weight, bias, alive, zeros):
        calls.append((tuple(weight.shape), alive.tolist()))
        launch(out, x, weight, bias, alive, zeros)

    monkeypatch.setattr(triton_launcher, "live_product_", noted)
    skipping = gradient_with(name, dead, torch.float32, "triton", again)
    # Queries, keys, values, output projections, the MLP; forward and back, and the first of these and the MLP again.
    assert len(calls) == 3 * (2 * (4 + of_mlp) + again * (3 + of_mlp))
    found = [flags for _, flags in calls]
    assert [1, 0, 1, 1] in found  # the first layer's heads
    assert [1, 1, 0, 0] in found  # the second's
    mlps = [flags for flags in found if len(flags) == 1]
    assert mlps.count([0]) == of_mlp * (2 + again)
    assert mlps.count([1]) == 2 * of_mlp * (2 + again)
    if name == "llama":
        assert [1, 0] in found  # pairs of heads share a key
        return
    calls.clear()
    dense = gradient_with(name, dead, torch.float32, "triton", again, gated=False)
    assert not calls
    torch.testing.assert_close(dense[0], skipping[0], rtol=0, atol=ONE_ROUNDING)
    assert (dense[1] - skipping[1]).norm() <= 2e-4 * skipping[1].norm()


def gradient_with(name, dead, dtype, backend, recompute, gated=None):
    """KL, its gradient by every mask, and the masks, of an example with random masks and these writers dead."""
    model = MaskedCausalLM(tiny_model(name, torch.float32).to(dtype), backend=backend)
    model.gated = gated
    graph, generator = model.graph, torch.Generator().manual_seed(3)
    reference = Reference(model, make_task().split("train"))
    run = EdgePruning(reference, 40, SETTINGS, execution=Execution("fixed", recompute=recompute))
    static = StaticStep(reference, run.parameters, run.parameters.optimizer(on_device=True), recompute)
    static.begin()
    mask = (torch.rand(graph.num_edges, generator=generator) * 2 - 0.5).clamp(0, 1)
    mask[np.isin(graph.edge_writers, list(dead(graph)))] = 0
    static.product = mask.to(model.mask_dtype)
    static.gradient, static.kl = torch.zeros_like(static.product), static.product.new_zeros(())
    indices = torch.tensor([2])
    static.accumulate(filled(reference, Bucket.of(reference, indices, 1), indices))
    return static.kl, static.gradient, static.product

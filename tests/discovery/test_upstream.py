"""``upstream_compat`` and the presets against the published code: its hyperparameters, steps, quirks and rounding.

The steps are those of the baseline that we are timed against, written from the same facts and sharing no code with the
package. What the baseline leaves out of the published Llama code is a few lines here (``PublishedLlama``).
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastcircuit.benchmarks.baselines import edge_pruning_step
from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning, expected_mask
from fastcircuit.discovery import PRESETS, Settings
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.upstream import decayed_log_alpha, published_circuit
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


class Row(NamedTuple):
    """A row of the table of published runs; ``node_loss``: is the writer target part of the loss?"""

    edge_targets: tuple[float, ...]
    node_target: float
    node_loss: bool
    rate: float
    multiplier_rate: float
    steps: int
    sparsity_warmup: int
    rate_warmup: int
    batch: int
    tracr: bool = False


SWEEP = tuple(round(0.94 + 0.005 * i, 3) for i in range(12))  # .94, .945, ... .995
IOI = (*SWEEP, 1.0, 1.01, 1.02, 1.05, 1.1)
PUBLISHED = {
    "ioi": Row(IOI, 0.72, False, 0.8, 0.8, 3000, 2500, 200, 32),
    "ioi-t1": Row(IOI, 0.72, False, 1.0, 1.0, 3000, 2500, 200, 32),
    "greater-than": Row((*SWEEP[2:], 1.0, 1.01, 1.02, 1.05, 1.1), 0.68, False, 0.8, 0.8, 3000, 2500, 200, 32),
    "gendered-pronoun": Row((0.93, *SWEEP, 1.0, 1.05, 1.1, 1.15, 1.2, 1.4), 0.69, False, 0.8, 0.8, 3000, 2500, 200, 32),
    "tracr-reverse": Row((1.02,), 0.1, False, 0.03, 0.001, 6000, 5900, 1500, 16, tracr=True),
    "tracr-xproportion": Row((0.92,), 0.4, True, 1.0, 1e-4, 720, 640, 96, 16, tracr=True),
    "boolean-expressions": Row((1.2,), 0.7, False, 0.8, 0.4, 6000, 5500, 200, 32),
}
# The published GPT-2 code differentiates the writer loss even where it is off; that of Llama and Tracr does not.
SILENT = ("ioi", "ioi-t1", "greater-than", "gendered-pronoun")


def test_every_published_run_has_a_preset():
    assert set(PRESETS) == {*PUBLISHED, "tracr"}  # the last is ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_hyperparameters(name):
    row, preset = PUBLISHED[name], PRESETS[name]
    assert preset.edge_target in row.edge_targets
    expected = {
        "node_target": row.node_target if row.node_loss else None,
        "silent_node_target": row.node_target if name in SILENT else None,
        "learning_rate": row.rate,
        "multiplier_learning_rate": row.multiplier_rate,
        "steps": row.steps,
        "sparsity_warmup": row.sparsity_warmup,
        "learning_rate_warmup": row.rate_warmup,
        "batch_size": row.batch,
        "linear_term": not row.tracr,
        "ablation": "zero" if row.tracr else "interchange",
        "output_bias": "split",
        # Common to all of them.
        "schedule": "linear",
        "node_masks": True,
        "initial_log_alpha": 10.0,
        "warm_start": None,
        "sparsity_estimate": "sampled",
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "refine": False,
        "upstream_compat": True,
    }
    assert {key: getattr(preset, key) for key in expected} == expected


# Most masks have a gradient at this level, the decay shows in four steps, and some steps are clipped.
SETTINGS = Settings(
    steps=4,
    batch_size=4,
    learning_rate=0.5,
    multiplier_learning_rate=0.8,
    learning_rate_warmup=1,
    sparsity_warmup=3,
    edge_target=0.97,
    initial_log_alpha=0.5,
    weight_decay=0.3,
    clip_norm=0.1,
    refine=False,
    upstream_compat=True,
)
CLIP = nn.utils.clip_grad_norm_
CASES = {
    # what: the model, its embedding writers, settings
    "gpt2": ("gpt2", "split", {"silent_node_target": 0.72}),
    "gpt2, writer loss": ("gpt2", "split", {"node_target": 0.4}),
    "gpt2, quadratic": ("gpt2", "split", {"silent_node_target": 0.72, "linear_term": False}),
    "gpt2, embeddings kept": ("gpt2", "none", {"silent_node_target": 0.72}),
    "llama": ("llama", "joint", {}),
    "llama, writer loss": ("llama", "joint", {"node_target": 0.4}),
    "llama, embeddings kept": ("llama", "none", {}),
}


class PublishedLlama(PublishedEdgePruning):
    """What the published Llama code does otherwise than that of GPT-2.

    The embedding writer's output is detached, and without a writer loss that is not computed at all.
    """

    def forward(self, ids, masks, corrupted=None):
        kept = {name: mask.detach() for name, mask in masks.items() if name == "write.e0"}
        return super().forward(ids, {**masks, **kept}, corrupted)

    def penalty(self, masks):
        if not self.node_loss:
            masks = {name: mask.detach() if name.startswith("write") else mask for name, mask in masks.items()}
        return super().penalty(masks)


def published_like(run, hf_model, embedding_nodes):
    """The published model at the start of ``run``: the same log-alphas, and those of impossible edges."""
    settings, llama = run.settings, hf_model.config.model_type == "llama"
    published = (PublishedLlama if llama else PublishedEdgePruning)(
        hf_model,
        embedding_nodes != "none",
        edge_target=settings.edge_target,
        node_target=settings.node_target or settings.silent_node_target or 0.0,
        learning_rate=settings.learning_rate,
        lambda_learning_rate=settings.multiplier_learning_rate,
        steps=settings.steps,
        warmup_steps=settings.learning_rate_warmup,
        sparsity_warmup_steps=settings.sparsity_warmup,
        node_loss=settings.node_target is not None,
    )
    for name, value in tensors(published, run.parameters.edge, run.parameters.node, settings.initial_log_alpha).items():
        published.log_alphas[name].data.copy_(value)
    for group in published.optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay
    for name, multiplier in published.lambdas.items():
        unused = (llama and not published.node_loss and "node" in name) or (
            not settings.linear_term and name.endswith("1")
        )
        multiplier.requires_grad_(not unused)
    return published


def tensors(published, edge, node, fill):
    """Values per edge and writer in the published tensors, ``fill`` where an edge cannot be."""
    values = published.masks_from(edge.detach(), node.detach())
    return {
        name: torch.where(published.valid[name].bool(), value, fill) if name in published.valid else value
        for name, value in values.items()
    }


def draws(published, noise):
    """The published sampling of masks, on ``noise`` by name in the order of the tensors."""
    left = iter([noise[name] for name in published.log_alphas])

    def sample_mask(log_alpha):
        u = next(left)
        concrete = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / (2 / 3))
        return (1.2 * concrete - 0.1).clamp(0, 1)

    return sample_mask


def batch_of(examples, indices):
    """What the published step takes: a span of answers per example."""
    asked = examples.answer_mask[indices].int()
    start = asked.argmax(1)
    return {
        "input_ids": examples.input_ids[indices],
        "corrupted_input_ids": examples.corrupted_input_ids[indices],
        "start": start,
        "end": start + asked.sum(1),
    }


def gradients_at_update(optimizer):
    """What the optimizer updates with, by parameter, as it was at every step."""
    seen = []

    def note(optimizer, *_):
        values = [value for group in optimizer.param_groups for value in group["params"]]
        seen.append({id(value): None if value.grad is None else value.grad.clone() for value in values})

    optimizer.register_step_pre_hook(note)
    return seen


def in_float64(norm, x):
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_the_published_steps_and_ends_in_the_published_circuit(case, monkeypatch):
    name, nodes, changes = CASES[case]
    monkeypatch.setattr(LlamaRMSNorm, "forward", in_float64)  # Hugging Face's is float32's, whatever the dtype
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda values, _: CLIP(values, SETTINGS.clip_norm))
    hf_model, examples = tiny_model(name), make_task().split("train")
    model = MaskedCausalLM(hf_model, nodes)
    run = EdgePruning(Reference(model, examples), 40, dataclasses.replace(SETTINGS, **changes))
    parameters = run.parameters.double()  # the multipliers too
    published = published_like(run, hf_model, nodes)
    found, expected = gradients_at_update(run.stepper.optimizer), gradients_at_update(published.optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(run.settings.steps):
        sizes = [len(parameters.edge), len(parameters.node)]
        noise = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
        monkeypatch.setattr(parameters, "draw", lambda step, generator, noise=noise: noise)
        by_name = tensors(published, *noise.split(sizes), fill=0.5)
        monkeypatch.setattr(edge_pruning_step, "sample_mask", draws(published, by_name))
        batch = batch_of(examples, run.batch_indices(step))
        run.step()
        loss = published.training_step(batch)
        run._flush(None)
        assert run.report().kl + run.report().penalty == pytest.approx(float(loss), rel=1e-9)
        assert_same_gradients(parameters, found[step], published, expected[step])
        assert_same_values(parameters, published)
    norms = [sum(float(grad.square().sum()) for grad in step.values() if grad is not None) ** 0.5 for step in expected]
    assert 0.9 * SETTINGS.clip_norm < max(norms) <= SETTINGS.clip_norm  # writer multipliers that do not train count too
    assert parameters.edge.std() > 0.05
    decayed = torch.cat([value.detach()[~real] for value, real in read_log_alphas(published)])
    torch.testing.assert_close(decayed, torch.full_like(decayed, decayed_log_alpha(run.settings)))
    circuit = published_circuit(parameters, None, hf_model.config.model_type)
    assert circuit.keep.tolist() == published_keep(published).tolist()
    assert 0 < circuit.num_edges < model.graph.num_edges


def assert_same_gradients(parameters, found, published, expected):
    """Of log-alphas and multipliers, as clipped; a writer without a gradient has none or one of 0."""
    edge, node = (found[id(value)] for value in (parameters.edge, parameters.node))
    for name, own in tensors(published, edge, node, 0.0).items():
        theirs = expected[id(published.log_alphas[name])]
        torch.testing.assert_close(own, torch.zeros_like(own) if theirs is None else theirs, rtol=1e-7, atol=1e-12)
    for name, own in multipliers(parameters).items():
        if id(own) in found and found[id(own)] is not None:
            torch.testing.assert_close(found[id(own)], expected[id(published.lambdas[name])], rtol=1e-9, atol=1e-12)


def assert_same_values(parameters, published):
    for name, own in tensors(published, parameters.edge, parameters.node, 0.0).items():
        theirs = published.log_alphas[name].detach() * published.valid.get(name, 1)
        torch.testing.assert_close(own, theirs, rtol=1e-7, atol=1e-9)
    for name, own in multipliers(parameters).items():
        torch.testing.assert_close(own, published.lambdas[name], rtol=1e-9, atol=1e-12)


def multipliers(parameters):
    pairs = {"edge": parameters.edge_multipliers, "node": parameters.node_multipliers}
    return {
        f"{kind}_{power}": value
        for kind, pair in pairs.items()
        for power, value in ((1, pair.linear), (2, pair.quadratic))
    }


def read_log_alphas(published):
    """Every log-alpha tensor of edges, and which of its entries are edges that can be."""
    return [
        (published.log_alphas[key], rows.expand_as(published.log_alphas[key]) > 0)
        for key, rows in published.valid.items()
    ]


def published_keep(published, tracr=False):
    """The edges that the published code keeps, ``[num_edges]``: both thresholds by bisection, of a program fixed."""
    graph = published.graph
    index = published.masks_from(torch.arange(graph.num_edges) + 0.0, torch.arange(graph.num_writers) + 0.0)
    soft = {name: expected_mask(value.detach()) for name, value in published.log_alphas.items()}
    edge, node = torch.zeros(graph.num_edges).double(), torch.zeros(graph.num_writers).double()
    for name, values in soft.items():
        real = published.valid[name].expand_as(values) > 0 if name in published.valid else torch.ones(values.shape) > 0
        (edge if name in published.valid else node)[index[name][real].long()] = values[real].double()
    counted = node[[name != "pos_embeds" for name in graph.writers]]  # the published count forgets them
    edge_threshold, node_threshold = (0.005, 0.005) if tracr else (bisected(edge), bisected(counted))
    return ((edge > edge_threshold) & (node > node_threshold)[graph.edge_writers]).numpy()


def bisected(soft):
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        threshold = (low + high) / 2
        too_sparse = (soft <= threshold).double().mean() > 1 - soft.mean()
        low, high = (low, threshold) if too_sparse else (threshold, high)
    return threshold


@pytest.mark.parametrize("case", ["gpt2", "llama", "llama, embeddings kept", "tracr"])
@pytest.mark.parametrize("seed", range(3))
def test_the_rounding_is_the_published_one(case, seed):
    """On log-alphas like those at the end of a run, where impossible edges have decayed to the middle."""
    program = case == "tracr"
    name, nodes, changes = CASES["gpt2" if program else case]
    hf_model = tiny_model(name)
    settings = dataclasses.replace(SETTINGS, **changes, initial_log_alpha=10.0, steps=30)
    run = EdgePruning(Reference(MaskedCausalLM(hf_model, nodes), make_task().split("train")), 40, settings)
    parameters = run.parameters
    with torch.no_grad():
        for place, value in enumerate((parameters.edge, parameters.node)):
            value.normal_(mean=-1.0 + 2 * place, std=3.0, generator=torch.Generator().manual_seed(seed))
    published = published_like(run, hf_model, nodes)
    for value, real in read_log_alphas(published):
        value.data[~real] = decayed_log_alpha(settings)
    circuit = published_circuit(parameters, None, "tracr" if program else name)
    assert circuit.keep.tolist() == published_keep(published, program).tolist()
    assert 10 < circuit.num_edges < run.model.graph.num_edges / 2
    fewer = published_circuit(parameters, circuit.num_edges - 5, "tracr" if program else name)
    assert fewer.num_edges == circuit.num_edges - 5
    assert not (fewer.keep & ~circuit.keep).any()

"""ACDC decides as one full forward pass per edge does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.acdc import acdc
from fastcircuit.discovery.incremental import changing_tokens
from fastcircuit.discovery.points import clean_points
from fastcircuit.errors import InputError
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Pair, Task
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


def one_edge_at_a_time(reference, threshold):
    """The definition: every edge, last to first, a full masked forward pass each. Returns keep, and the KL rises."""
    edges = reference.model.graph.num_edges
    mask, rises = torch.ones(edges, dtype=torch.float64), np.zeros(edges)
    kl = mean_kl(reference, Masks(mask))
    for edge in reversed(range(edges)):
        mask[edge] = 0
        without = mean_kl(reference, Masks(mask))
        rises[edge] = without - kl
        if rises[edge] < threshold:
            kl = without
        else:
            mask[edge] = 1
    return mask.bool().numpy(), rises


def task_with_common_starts(num=4, vocabulary=41, seed=0):
    """Prompts that are their corrupted ones up to some token, or from there on; answers on both sides of it."""
    rng = np.random.default_rng(seed)

    def row():
        length = int(rng.integers(4, 8))
        clean, corrupted = (rng.integers(vocabulary, size=length) for _ in range(2))
        start = int(rng.integers(1, length))
        corrupted[:start] = clean[:start]
        if rng.integers(2):
            corrupted[start + 1 :] = clean[start + 1 :]
        ids = (tuple(int(token) for token in each) for each in (clean, corrupted))
        return Pair(*ids, (0, length - 1), (1, 2), (3, -100))

    return Task("tiny", {"train": Examples.from_pairs([row() for _ in range(num)])}, None, "random pairs")


def random_model(kind, layers, heads, kv_heads, seed):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=41, n_positions=16, n_embd=4 * heads, n_layer=layers, n_head=heads)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=41,
            hidden_size=4 * heads,
            intermediate_size=12,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return MaskedCausalLM(model.double().eval())


def check(reference, share):
    """With ``share`` of the KL of the empty circuit as the threshold."""
    threshold = share * mean_kl(reference, Masks(torch.zeros(reference.model.graph.num_edges, dtype=torch.float64)))
    found = acdc(reference, threshold)
    keep, rises = one_edge_at_a_time(reference, threshold)
    np.testing.assert_allclose(found.rises, rises, rtol=1e-7, atol=1e-10)
    np.testing.assert_array_equal(found.keep, keep)
    circuit = Circuit(reference.model.graph, keep)
    assert found.history[-1, 3] == pytest.approx(mean_kl(reference, Masks.from_circuit(circuit)), rel=1e-7, abs=1e-10)
    return found


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["gpt2", "llama"]),
    layers=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    ablation=st.sampled_from(["interchange", "mean", "zero"]),
    share=st.sampled_from([1e-3, 1e-2, 0.03, 0.2]),
    seed=st.integers(0, 99),
    make=st.sampled_from([make_task, task_with_common_starts]),
)
def test_decisions_on_random_models(kind, layers, heads, ablation, share, seed, make):
    model = random_model(kind, layers, *heads, seed)
    check(Reference(model, make(4, seed=seed).split("train"), ablation), share)


@pytest.mark.parametrize("name", ["gpt2", "llama-biases-head-dim", "mistral-window"])
def test_decisions_where_prompts_begin_alike(name):
    model = MaskedCausalLM(tiny_model(name))
    reference = Reference(model, task_with_common_starts(5).split("train"))
    (point,) = clean_points(reference, "kl", 2**28)
    assert len(changing_tokens(point)) < point.batch.packing.num_tokens
    found = check(reference, 0.01)
    assert 0 < found.keep.sum() < len(found.keep)


@pytest.mark.parametrize(("name", "share"), [("llama-biases-head-dim", 0.01), ("gpt2", 0.01)])
def test_decisions_with_several_batches(name, share, monkeypatch):
    monkeypatch.setattr("fastcircuit.discovery.acdc.BATCH_BYTES", 60_000)
    model = MaskedCausalLM(tiny_model(name))
    found = check(Reference(model, make_task(5).split("train")), share)
    assert 0 < found.keep.sum() < len(found.keep)


def test_a_large_threshold_removes_everything_and_zero_keeps_what_helps():
    model = MaskedCausalLM(tiny_model("llama"))
    reference = Reference(model, make_task(3).split("train"))
    assert not acdc(reference, 1e9).keep.any()
    kept = acdc(reference, 0.0)
    assert (kept.rises[kept.keep] >= 0).all()
    assert (kept.rises[~kept.keep] < 0).all()


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_bad_threshold(threshold):
    model = MaskedCausalLM(tiny_model("llama"))
    with pytest.raises(InputError, match=r"threshold is .*; acdc needs a KL rise in nats, 0 or more"):
        acdc(Reference(model, make_task(3).split("train")), threshold)

"""Algorithm 1, fast, decides as Algorithm 1 as written: random models, random prompts, the shipped models."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastcircuit import MaskedCausalLM, load_task, zoo
from fastcircuit.extraction import evaluator, prompts, reference, score, sweep
from fastcircuit.extraction.ablation import ablation_constants
from fastcircuit.extraction.candidates import Rule, layer_order
from fastcircuit.extraction.evaluator import Evaluator
from fastcircuit.extraction.greedy import prune_paths
from fastcircuit.extraction.path import Path
from fastcircuit.extraction.prefix import Prefix
from fastcircuit.extraction.prompts import Prompts, chunked
from fastcircuit.extraction.prune import halves
from fastcircuit.extraction.size import Sizes
from fastcircuit.submodel.kept import Kept
from tests.extraction.random_models import models, random_task, sensitive, tasks
from tests.models.tiny import TINY

MODES = ("fast", "reference")
THRESHOLDS = st.floats(-4, 1).map(lambda exponent: 10**exponent)
ABLATION = st.sampled_from([("mean", "split"), ("zero", "split"), ("zero", "kept"), ("mean-positional", "split")])


def decisions(pruning):
    return [(candidate.name, candidate.removed) for candidate in pruning.history]


def assert_same(fast, slow, tolerance=1e-9):
    assert decisions(fast) == decisions(slow)
    np.testing.assert_array_equal(fast.kept.heads, slow.kept.heads)
    np.testing.assert_array_equal(fast.kept.mlps, slow.kept.mlps)
    for ours, theirs in zip(fast.history, slow.history, strict=True):
        assert ours.kl == pytest.approx(theirs.kl, abs=tolerance, rel=tolerance)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(data=st.data(), model=models(), ablation=ABLATION, thresholds=st.lists(THRESHOLDS, min_size=1, max_size=3))
def test_fast_decides_as_the_reference(data, model, ablation, thresholds):
    kind, output_bias = ablation
    task = data.draw(tasks(equal_length=kind == "mean-positional"))
    options = {
        "ablation": kind,
        "output_bias": output_bias,
        "head_order": data.draw(st.sampled_from(["code", "paper"])),
        "include_mlps": data.draw(st.booleans()),
        "kl_budget": data.draw(st.none() | THRESHOLDS),
        "size_budget": data.draw(st.none() | st.floats(0.1, 0.9)),
        "seed": data.draw(st.integers(0, 5)),
    }
    fast = sweep(model, task, thresholds, **options)
    slow = sweep(model, task, thresholds, mode="reference", **options)
    for ours, theirs in zip(fast.points, slow.points, strict=True):
        if theirs.near_ties:
            continue
        assert_same(ours, theirs)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), model=models(), threshold=THRESHOLDS)
def test_float32_differs_at_reported_ties_only(data, model, threshold):
    task = data.draw(tasks())
    slow = sweep(model, task, [threshold], mode="reference").points[0]
    fast = sweep(MaskedCausalLM(model.model.float()), task, [threshold]).points[0]
    for ours, theirs in zip(fast.history, slow.history, strict=True):
        if ours in fast.near_ties:
            return
        assert (ours.name, ours.removed) == (theirs.name, theirs.removed)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_every_architecture(name, kind):
    model, task = MaskedCausalLM(sensitive(name)), random_task({"train": 8, "test": 3})
    points = zip(*(sweep(model, task, [1e-3, 0.01, 0.1], ablation=kind, mode=m).points for m in MODES), strict=True)
    for fast, slow in points:
        assert not slow.near_ties
        assert_same(fast, slow)


@pytest.mark.parametrize(
    ("model_name", "task_name"),
    [("stories260K", "pronoun"), ("stories260K", "pronoun-212"), ("induction-gpt2", "induction")],
)
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_shipped_models(model_name, task_name, kind):
    model = MaskedCausalLM.from_pretrained(model_name, dtype=torch.float64)
    task = load_task(task_name, AutoTokenizer.from_pretrained(zoo.resolve(model_name)))
    options = {"ablation": kind, "most_examples": 20}
    points = zip(*(sweep(model, task, [0.003, 0.03], mode=mode, **options).points for mode in MODES), strict=True)
    for fast, slow in points:
        assert not slow.near_ties
        assert_same(fast, slow)


def test_small_chunks_little_memory_and_wide_speculation_change_nothing(monkeypatch):
    model, task = MaskedCausalLM(sensitive("qwen2-mixed-window")), random_task({"train": 16, "test": 3})
    expected = sweep(model, task, [0.05, 0.5])
    for tokens, rows, logits, prefix in itertools.product([1, 20], [1, 10**6], [1, 2**20], [1, 2**13]):
        monkeypatch.setitem(prompts.CHUNK_TOKENS, "cpu", tokens)
        monkeypatch.setitem(evaluator.FULL_ROWS, "cpu", rows)
        monkeypatch.setattr(prompts, "LOGIT_BYTES", logits)
        monkeypatch.setattr(evaluator, "PREFIX_BYTES", prefix)
        found = sweep(model, task, [0.05, 0.5])
        for ours, theirs in zip(found.points, expected.points, strict=True):
            assert_same(ours, theirs)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), model=models())
def test_the_pruned_model_is_the_reference(data, model):
    """Blocks with fused weights, computed only where needed, against the plain forward."""
    task = data.draw(tasks())
    graph, examples = model.graph, task.split("train")
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    share = data.draw(st.floats(0, 1))
    heads = generator.random((graph.num_layers, graph.num_heads)) < share
    kept = Kept(heads, generator.random(graph.num_layers) < share)
    constants = ablation_constants(model, examples, "mean")
    chunk = Prompts(model, examples, 1.0)
    found = score._answers(score.pruned_model(model, constants, kept), chunk)
    torch.testing.assert_close(found, reference.pruned_log_probs(model, constants, kept, examples))


@pytest.mark.parametrize("capacity", [1, 2, 3, 100])
def test_prefix_streams_with_little_memory(capacity):
    model = MaskedCausalLM(sensitive("llama"))
    examples = random_task({"train": 6}).split("train")
    constants = ablation_constants(model, examples, "zero")
    chunks = list(chunked(model, examples))
    tokens = int(examples.attention_mask.sum())
    prefix = Prefix(model, constants, chunks, budget=capacity * tokens * model.config.hidden_size * 8)
    states, final, _ = model.run(examples.input_ids, examples.attention_mask)
    for layer in (3, 2, 1, 0):
        weights = [block.attention.out_weight.flatten(0, 1) for block in model.anatomy.blocks]
        written = states.embeds.sum(0) + sum(states.heads[i] @ weights[i] + states.mlps[i] for i in range(layer))
        torch.testing.assert_close(prefix.inputs(layer)[0], written)
        assert len(prefix._kept) <= max(1, capacity)
        if layer == 3:
            torch.testing.assert_close(prefix.inputs(layer)[0], final)


def test_thresholds_share_what_they_have_in_common():
    model, task = MaskedCausalLM(sensitive("gpt2")), random_task({"train": 16, "test": 3})
    _, validation = halves(task)
    constants = ablation_constants(model, validation, "mean")
    counts = []
    for thresholds in ([0.1], [0.1, 0.1 + 1e-9], [0.1] * 5):
        shared = Evaluator(model, constants, validation)
        run(shared, thresholds)
        counts.append(shared.evaluations)
    assert counts[0] == counts[1] == counts[2]


def run(shared, thresholds):
    model = shared.model
    paths = [Path(Rule(threshold), Sizes.of(model, 0), 0.0, reference.everything(model)) for threshold in thresholds]
    prune_paths(shared, paths, layer_order(model.graph.num_heads, "code", True))


def test_rejections_make_speculation_narrow(monkeypatch):
    """With every candidate rejected, none is computed in vain."""
    model, task = MaskedCausalLM(sensitive("gpt2")), random_task({"train": 16, "test": 3})
    _, validation = halves(task)
    shared = Evaluator(model, ablation_constants(model, validation, "mean"), validation)
    monkeypatch.setattr("fastcircuit.extraction.path.Rule.margin", lambda *_: -1.0, raising=False)
    run(shared, [0.1])
    assert shared.evaluations == model.graph.num_layers * (model.graph.num_heads + 1)


def test_head_orders():
    assert layer_order(3, "code", True) == [0, 1, 2, 3]
    assert layer_order(3, "paper", True) == [2, 1, 0, 3]
    assert layer_order(3, "paper", False) == [2, 1, 0]
    model, task = MaskedCausalLM(sensitive("gpt2")), random_task({"train": 8, "test": 3})
    names = [candidate.name for candidate in sweep(model, task, [1.0], head_order="paper").points[0].history]
    assert names[:6] == ["a2.h3", "a2.h2", "a2.h1", "a2.h0", "m2", "a1.h3"]

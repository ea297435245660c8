"""The reference cache and the metrics computed from it."""

import math

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.faithfulness import evaluate, mean_kl
from fastcircuit.evaluation.metrics import accuracy, exact_match, kl_divergence, logit_difference
from fastcircuit.evaluation.overlap import overlap
from fastcircuit.evaluation.reference import Reference
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


@pytest.fixture
def model():
    return MaskedCausalLM(tiny_model("llama"))


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
def test_cached_batches_equal_computed_ones(model, ablation):
    examples = make_task().split("train")
    kept, computed = (Reference(model, examples, ablation, budgets=Budgets(budget, 0)) for budget in (2**30, 0))
    assert kept.cache.num_on_device == len(examples)
    assert computed.cache.num_kept == 0
    for indices in (torch.tensor([3, 0, 7]), torch.tensor([9]), torch.arange(10)):
        a, b = kept.batch(indices), computed.batch(indices)
        torch.testing.assert_close(a.answers.log_probs, b.answers.log_probs)
        for name in ("embeds", "heads", "mlps"):
            torch.testing.assert_close(getattr(a.ablated, name), getattr(b.ablated, name))


@pytest.mark.parametrize("ablation", ["interchange", "mean"])
@pytest.mark.parametrize(("device", "host"), [(0.4, 0), (0, 0.4), (0.3, 0.4), (0.5, 1)])
def test_small_budgets_keep_the_first_examples(model, monkeypatch, ablation, device, host):
    monkeypatch.setattr("fastcircuit.evaluation.reference.CHUNK_TOKENS", 8)
    examples = make_task().split("train")
    everything = Reference(model, examples, ablation)
    size = cached_bytes(everything.cache)
    some = Reference(model, examples, ablation, budgets=Budgets(int(device * size), int(host * size)))
    assert cached_bytes(some.cache) <= (device + host) * size
    on_device, kept = some.cache.num_on_device, some.cache.num_kept
    assert kept > 0
    assert (kept == len(examples)) == (device + host > 1)
    assert on_device <= kept
    batches = [torch.arange(10), torch.tensor([9, 0]), torch.tensor([0]), torch.tensor([9]), torch.tensor([5, 4, 8, 1])]
    for indices in batches:
        found, expected = some.batch(indices), everything.batch(indices)
        torch.testing.assert_close(found.answers.log_probs, expected.answers.log_probs)
        for name in ("embeds", "heads", "mlps"):
            torch.testing.assert_close(getattr(found.ablated, name), getattr(expected.ablated, name))


@pytest.mark.parametrize("ablation", ["interchange", "mean"])
def test_out_of_memory_halves_what_is_computed_at_once(model, monkeypatch, ablation):
    examples, notes, whole = make_task().split("train"), [], MaskedCausalLM.run
    expected = Reference(model, examples, ablation)

    def run(self, input_ids, attention_mask=None):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, input_ids, attention_mask)

    monkeypatch.setattr(MaskedCausalLM, "run", run)
    found = Reference(model, examples, ablation, on_note=notes.append)
    assert notes[0].startswith("out of memory in the full model: going on with about ")
    assert found.cache.num_kept == len(examples)
    for own, other in zip(found.cache.take(torch.arange(5)), expected.cache.take(torch.arange(5)), strict=True):
        torch.testing.assert_close(own, other)
    if ablation == "mean":
        torch.testing.assert_close(found.constant.heads, expected.constant.heads)


def test_out_of_memory_that_stays_keeps_less(model, monkeypatch):
    notes, whole, calls = [], MaskedCausalLM.run, []

    def run(self, input_ids, attention_mask=None):
        calls.append(input_ids)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, input_ids, attention_mask)

    monkeypatch.setattr(MaskedCausalLM, "run", run)
    reference = Reference(model, make_task().split("train"), budgets=Budgets(9000, 0), on_note=notes.append)
    assert reference.cache.num_kept == 0
    assert "keeping at most 0 MiB" in notes[-1]


def cached_bytes(cache):
    held = [part for tier in cache._tiers for part in (tier.rows, tier.log_probs) if part is not None]
    return sum(part.numel() * part.element_size() for part in held)


def test_evaluate_equals_the_formulas(model):
    task = make_task()
    examples = task.split("test")
    circuit = Circuit(model.graph, np.random.default_rng(0).random(model.graph.num_edges) < 0.5)
    found = evaluate(model, circuit, task)
    kl, hits, match, difference = [], [], [], []
    for row in range(len(examples)):
        length = int(examples.attention_mask[row].sum())
        clean, corrupted = (
            examples.input_ids[row : row + 1, :length],
            examples.corrupted_input_ids[row : row + 1, :length],
        )
        places = examples.answer_mask[row].nonzero().squeeze(1)
        full = model(clean).logits[0, places].log_softmax(-1)
        own = (
            model(clean, corrupted_input_ids=corrupted, masks=Masks.from_circuit(circuit))
            .logits[0, places]
            .log_softmax(-1)
        )
        right = examples.answers[row, places]
        kl.append((full.exp() * (full - own)).sum(-1).mean())
        hits.append((own.argmax(-1) == right).double().mean())
        match.append((own.argmax(-1) == full.argmax(-1)).double().mean())
        difference.append(own[0, right[0]] - own[0, examples.distractors[row, places[0]]])
    assert found["kl"] == pytest.approx(torch.stack(kl).mean().item())
    assert found["accuracy"] == pytest.approx(torch.stack(hits).mean().item())
    assert found["exact_match"] == pytest.approx(torch.stack(match).mean().item())
    assert found["logit_difference"] == pytest.approx(torch.stack(difference).mean().item())
    assert found["examples"] == len(examples)


def test_out_of_memory_in_evaluation_halves_the_batches(model, monkeypatch):
    task, notes = make_task(), []
    circuit = Circuit(model.graph, np.random.default_rng(0).random(model.graph.num_edges) < 0.5)
    expected, whole, most = evaluate(model, circuit, task), MaskedCausalLM.final_read, [4]

    def final_read(self, token_ids, packing, *rest, **options):
        if packing.shape[0] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, token_ids, packing, *rest, **options)

    monkeypatch.setattr(MaskedCausalLM, "final_read", final_read)
    assert evaluate(model, circuit, task, on_note=notes.append) == pytest.approx(expected)
    assert notes == [f"out of memory in evaluation: going on with {size} examples at a time" for size in (5, 2)]
    reference = Reference(model, task.split("test"))
    assert mean_kl(reference, Masks.from_circuit(circuit)) == pytest.approx(expected["kl"])
    assert reference.batch_size == 2  # kept for the next circuit
    most[0] = 0
    with pytest.raises(RunError, match="evaluation: out of memory with one example at a time; free memory on cpu"):
        evaluate(model, circuit, task)


def test_the_full_circuit_is_faithful(model):
    found = evaluate(model, Circuit.full(model.graph), make_task())
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["exact_match"] == 1
    assert found["accuracy"] == found["model_accuracy"]


def test_metrics_by_hand():
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    own = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(kl_divergence(reference, own), torch.tensor([expected, 0.0]))
    assert accuracy(own, torch.tensor([1, 1])).tolist() == [1, 0]
    assert exact_match(reference, own)[1] == 1
    difference = logit_difference(own, torch.tensor([1, 0]), torch.tensor([0, -100]))
    assert difference[0].item() == pytest.approx(math.log(3))
    assert difference[1].isnan()


def test_circuits_of_other_models_are_refused(model):
    with pytest.raises(InputError, match=r"is over \d+ layers of \d+ heads .* this model has .* it was found in"):
        evaluate(model, Circuit.full(Graph(2, 2, 2)), make_task())
    with pytest.raises(InputError, match="hidden_size is 99, this model's is 24"):
        evaluate(model, Circuit.full(model.graph, model={"hidden_size": 99}), make_task())
    with pytest.raises(InputError, match="validation"):
        evaluate(model, Circuit.full(model.graph), make_task(), split="validation")


def test_overlap_counts_and_chance():
    graph = Graph(2, 2, 2)
    keep = torch.zeros(graph.num_edges, dtype=torch.bool)
    first, second = keep.clone(), keep.clone()
    first[:10], second[5:25] = True, True
    found = overlap(Circuit(graph, first.numpy()), Circuit(graph, second.numpy()))
    assert (found["intersection"], found["union"], found["only_first"], found["only_second"]) == (5, 25, 5, 15)
    assert found["ratio_to_chance"] == pytest.approx(5 / (10 * 20 / graph.num_edges))
    assert found["fraction_of_smaller"] == 0.5

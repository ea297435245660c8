"""Scores of every attribution method against a slow oracle, and the circuits that follow from scores."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.attribution import attribute
from fastcircuit.discovery.scores import Scores
from fastcircuit.errors import InputError
from fastcircuit.evaluation.reference import Reference
from fastcircuit.graph import Graph
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.attribution_oracle import Oracle
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model

EXAMPLES, STEPS = 3, 2
CASES = [("gpt2", "zero"), ("llama-biases-head-dim", "interchange"), ("mistral-window", "mean")]


def oracles(model, task, ablation, loss):
    """One per example; means and zeros as the ablation defines them, written out here."""
    examples, graph = task.split("train"), model.graph
    lengths = examples.attention_mask.sum(1).tolist()
    prompts = [examples.corrupted_input_ids[row, :length] for row, length in enumerate(lengths)]
    outputs = [Oracle(model.model, graph, ids, ids, lambda *_: 0).clean for ids in prompts]
    means = {name: torch.cat([each[name] for each in outputs]).mean(0) for name in graph.writers}
    zeros = {name: torch.zeros_like(mean) for name, mean in means.items()}
    for row, length in enumerate(lengths):
        ablated = {"interchange": prompts[row], "mean": means, "zero": zeros}[ablation]
        where = examples.answer_mask[row, :length]
        right, wrong = (tokens[row, :length][where] for tokens in (examples.answers, examples.distractors))

        def of(logits, clean, where=where, right=right, wrong=wrong):
            picked = torch.log_softmax(logits[where], -1)
            target = torch.log_softmax(clean[where], -1)
            if loss == "kl":
                return (target.exp() * (target - picked)).sum(-1).mean()
            places = torch.arange(len(right))
            if loss == "nll":
                return -picked[places, right].mean()
            known = wrong >= 0
            return (picked[places, wrong.clamp(min=0)] - picked[places, right])[known].mean()

        yield Oracle(model.model, graph, examples.input_ids[row, :length], ablated, of)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
@pytest.mark.parametrize(("name", "ablation"), CASES)
def test_scores_equal_the_oracle(name, method, ablation):
    model, task = MaskedCausalLM(tiny_model(name)), make_task(EXAMPLES)
    loss = "logit-difference" if method == "eap" else "kl"
    scores = attribute(model, task, method, ig_steps=STEPS, ablation=ablation)
    each = [oracle.scores(method, STEPS) for oracle in oracles(model, task, ablation, loss)]
    expected = torch.stack(each).mean(0).numpy()
    np.testing.assert_allclose(scores.edge, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("loss", ["logit-difference", "nll"])
def test_other_losses(loss):
    model, task = MaskedCausalLM(tiny_model("gpt2")), make_task(EXAMPLES)
    scores = attribute(model, task, "clean-corrupted", loss=loss)
    each = [oracle.scores("clean-corrupted", 1) for oracle in oracles(model, task, "interchange", loss)]
    expected = torch.stack(each).mean(0).numpy()
    np.testing.assert_allclose(scores.edge, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "ablation"), [("gpt2", "mean"), ("llama-biases-head-dim", "interchange")])
def test_exact_rises_equal_the_oracle(name, ablation):
    model, task = MaskedCausalLM(tiny_model(name)), make_task(EXAMPLES)
    graph = model.graph
    scores = attribute(model, task, "exact", ablation=ablation)
    each = list(oracles(model, task, ablation, "kl"))
    sites = [np.arange(graph.num_edges)[site.edge_slice] for site in graph.sites]
    edges = np.concatenate([np.random.default_rng(0).choice(numbers, 2, replace=False) for numbers in sites])
    with torch.no_grad():
        expected = [float(sum(oracle.rise([edge]) for oracle in each)) / EXAMPLES for edge in edges.tolist()]
        of_nodes = [np.flatnonzero(graph.edge_writers == writer) for writer in range(graph.num_writers)]
        nodes = [float(sum(oracle.rise(numbers) for oracle in each)) / EXAMPLES for numbers in of_nodes]
    np.testing.assert_allclose(scores.edge[edges], expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(scores.node, nodes, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("embedding_nodes", ["joint", "none"])
def test_other_embedding_conventions_score_the_same_edges_alike(embedding_nodes):
    hf_model, task = tiny_model("gpt2"), make_task(EXAMPLES)
    split = attribute(MaskedCausalLM(hf_model), task, "eap")
    model = MaskedCausalLM(hf_model, embedding_nodes)
    other = attribute(model, task, "eap")
    expected = {pair: score for pair, score in zip(split.graph.edges, split.edge, strict=True) if pair[0][0] in "am"}
    if embedding_nodes == "joint":
        of = dict(zip(split.graph.edges, split.edge, strict=True))
        readers = model.graph.readers
        expected |= {("embeds", to): of["tok_embeds", to] + of["pos_embeds", to] for to in readers}
    assert set(model.graph.edges) == set(expected)
    np.testing.assert_allclose(other.edge, [expected[pair] for pair in model.graph.edges], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact"])
def test_batches_and_recomputed_blocks_change_nothing(method, monkeypatch):
    model, task = MaskedCausalLM(tiny_model("llama")), make_task(EXAMPLES)
    whole = attribute(model, task, method)
    monkeypatch.setattr("fastcircuit.discovery.plain_run.KEEP_BYTES", 0)
    done = []
    single = attribute(model, task, method, batch_bytes=1, on_batch=lambda *place: done.append(place))
    np.testing.assert_allclose(single.edge, whole.edge, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(single.node, whole.node, rtol=1e-9, atol=1e-12)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_a_writers_score_is_its_edges_and_random_is_seeded():
    model, task = MaskedCausalLM(tiny_model("llama")), make_task(EXAMPLES)
    scores = attribute(model, task, "eap-ig")
    of_writer = scores.edge[model.graph.edge_writers == 3]
    assert scores.node[3] == pytest.approx(of_writer.sum(), rel=1e-12)
    first, again, other = (attribute(model, task, "random", seed=seed).edge for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_answers_among_restricted_tokens():
    model = MaskedCausalLM(tiny_model("llama"))
    task = dataclasses.replace(make_task(EXAMPLES), answer_tokens=(1, 2, 3))
    reference = Reference(model, task.split("train"), answer_tokens=task.answer_tokens)
    assert reference.batch(torch.arange(2)).answers.log_probs.shape[1] == 3
    wide = attribute(model, make_task(EXAMPLES), "clean-corrupted", loss="nll").edge
    narrow = attribute(model, task, "clean-corrupted", loss="nll").edge
    assert not np.allclose(wide, narrow)


def made_scores(values):
    graph = Graph(1, 2, 1, "joint")
    edge = np.resize(np.asarray(values, dtype=float), graph.num_edges)
    return Scores(graph, edge, np.arange(graph.num_writers, dtype=float))


def test_circuits_by_count_threshold_and_sign(tmp_path):
    scores = made_scores([0.5, -3.0, 0.1, 2.0])
    assert scores.circuit(5, pruned=False).keep.sum() == 5
    assert scores.circuit(5).num_edges == scores.circuit(5).pruned().num_edges == 5
    signed = scores.circuit(threshold=0.3, absolute=False, pruned=False)
    np.testing.assert_array_equal(signed.keep, scores.edge >= 0.3)
    either = scores.circuit(threshold=0.3, pruned=False)
    np.testing.assert_array_equal(either.keep, np.abs(scores.edge) >= 0.3)
    assert scores.circuit(threshold=0.3) == either.pruned()
    scores.save(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "scores.safetensors")["edge"].numpy(), scores.edge)


def test_a_node_circuit_has_every_edge_between_its_nodes():
    scores = made_scores([1.0])
    circuit = scores.node_circuit(2, pruned=False)
    assert set(circuit.edges) == {("a0.h1", "m0"), ("a0.h1", "resid_post"), ("m0", "resid_post")}
    assert not scores.node_circuit(2).num_edges  # nothing clean comes in: the embeddings are not among the two
    everything = scores.node_circuit(scores.graph.num_writers)
    assert everything == Circuit.full(scores.graph)


BAD = {
    "method": (lambda model, task: attribute(model, task, "magic"), "attribution methods are eap, eap-ig"),
    "loss": (lambda model, task: attribute(model, task, loss="hinge"), "losses are kl, logit-difference, nll"),
    "eap kl": (lambda model, task: attribute(model, task, "eap", loss="kl"), "is zero at the full model"),
    "steps": (lambda model, task: attribute(model, task, ig_steps=0), "ig_steps is 0"),
    "ablation": (lambda model, task: attribute(model, task, ablation="none"), "accepted: interchange, mean, zero"),
    "no distractor": (lambda model, task: attribute(model, without_distractors(task), "eap"), "use loss nll"),
    "nan": (lambda model, task: made_scores([1.0, np.nan]), "edge scores are NaN, the first of embeds -> a0.h1.q"),
    "shape": (lambda model, task: Scores(model.graph, np.zeros(3), np.zeros(3)), "edge scores have shape"),
    "too many": (lambda model, task: made_scores([1.0]).circuit(10**6), "1 to 11 edges to keep"),
    "too many nodes": (lambda model, task: made_scores([1.0]).node_circuit(9), "1 to 4 writers to keep"),
    "both": (lambda model, task: made_scores([1.0]).circuit(3, 0.5), "one of them"),
}


def without_distractors(task):
    train = task.split("train")
    none = dataclasses.replace(train, distractors=torch.full_like(train.distractors, -100))
    return dataclasses.replace(task, splits={**task.splits, "train": none})


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call(MaskedCausalLM(tiny_model("llama")), make_task(EXAMPLES))

"""What follows the optimisation: rounding to an exact size, elimination, regrowing, swaps, joint moves."""

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.joint import joint_pairs, with_pair
from fastcircuit.discovery.refine import Refiner, _without
from fastcircuit.discovery.rounding import top_circuit
from fastcircuit.errors import RunError
from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import Reference
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.stream import MaskedRun
from fastcircuit.tasks import load_task
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


def test_exactly_as_many_edges_as_asked_whatever_the_scores():
    graph = Graph(2, 2, 1, "split")
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=graph.num_edges)
        for edges in (1, 2, 5, 20, graph.num_edges - 1, graph.num_edges):
            circuit = top_circuit(graph, scores, edges)
            assert circuit.num_edges == edges
    best = {("tok_embeds", "a0.h0.v"), ("a0.h0", "resid_post"), ("tok_embeds", "resid_post")}
    scores = np.array([float(edge in best) for edge in graph.edges])
    assert set(top_circuit(graph, scores, 3).edges) == best


def test_dangling_edges_do_not_count():
    graph = Graph(2, 2, 1, "split")
    order = [("tok_embeds", "a1.h0.q"), ("tok_embeds", "resid_post"), ("pos_embeds", "resid_post")]
    scores = np.array([3.0 - order.index(edge) if edge in order else -1.0 for edge in graph.edges])
    assert top_circuit(graph, scores, 2).edges == order[1:]


@pytest.mark.parametrize("ablation", ["interchange", "mean"])
def test_refining_lowers_the_training_kl_and_keeps_the_size(model, ablation):
    reference = Reference(model, make_task().split("train"), ablation)
    scores = np.random.default_rng(0).normal(size=model.graph.num_edges)
    circuit = top_circuit(model.graph, scores, 40, ablation)
    rounds = []
    refined = Refiner(reference, on_round=lambda stage, done, most, kl: rounds.append(kl)).swap(circuit, 30)
    before, after = (mean_kl(reference, Masks.from_circuit(each)) for each in (circuit, refined))
    assert after < 0.9 * before
    assert refined.num_edges == 40
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] == pytest.approx(after, rel=1e-4)


def test_out_of_memory_in_refinement_halves_the_batches(model, monkeypatch):
    reference, notes = Reference(model, make_task().split("train")), []
    circuit = top_circuit(model.graph, np.random.default_rng(1).normal(size=model.graph.num_edges), 30)
    expected, refiner = Refiner(reference), Refiner(reference, on_note=notes.append)
    kl, gradient = expected.kl(circuit), expected._gradient(circuit)
    whole, most = MaskedCausalLM.final_read, [3]

    def final_read(self, token_ids, packing, *rest, **options):
        if packing.shape[0] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, token_ids, packing, *rest, **options)

    monkeypatch.setattr(MaskedCausalLM, "final_read", final_read)
    assert refiner.kl(circuit) == pytest.approx(kl, rel=1e-5)
    most[0] = 1
    np.testing.assert_allclose(refiner._gradient(circuit), gradient, rtol=1e-3, atol=1e-6)
    assert refiner.batch_size == 1
    assert notes[-1] == "out of memory in refinement: going on with 1 examples at a time"
    most[0] = 0
    with pytest.raises(RunError, match="refinement: out of memory with one example at a time; free memory on cpu"):
        refiner.kl(circuit)


def test_elimination_is_the_greedy_one(model):
    reference = Reference(model, make_task().split("train"))
    refiner = Refiner(reference)
    circuit = top_circuit(model.graph, np.random.default_rng(1).normal(size=model.graph.num_edges), 12)
    left = refiner.eliminate(circuit, 11)
    without = [
        Circuit(model.graph, circuit.keep & (np.arange(len(circuit.keep)) != e)).pruned()
        for e in np.flatnonzero(circuit.keep)
    ]
    assert refiner.kl(left) == min(refiner.kl(each) for each in without if each.num_edges == 11)
    assert refiner.eliminate(circuit, 5).num_edges == 5


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_removals_are_measured_from_their_layer_on(name, ablation, monkeypatch):
    model = MaskedCausalLM(tiny_model(name, torch.float64))
    refiner = Refiner(Reference(model, make_task().split("train"), ablation))
    circuit = top_circuit(model.graph, np.random.default_rng(3).normal(size=model.graph.num_edges), 25, ablation)
    run_layer, run = MaskedRun._run_layer, []

    def counted(self, layer, *rest):
        run.append(layer)
        run_layer(self, layer, *rest)

    monkeypatch.setattr(MaskedRun, "_run_layer", counted)
    refiner._gradient(circuit, kept_only=True)
    for edge in np.flatnonzero(circuit.keep):
        candidate = _without(circuit, edge)
        run.clear()
        found = refiner._kl_without(edge, candidate)
        layer = next(site.layer for site in model.graph.sites if edge < site.edge_slice.stop)
        assert run == list(range(layer, model.graph.num_layers - 1))
        assert found == pytest.approx(refiner.kl(candidate), rel=1e-9)


def test_elimination_says_when_no_removal_ends_at_the_size(model):
    refiner = Refiner(Reference(model, make_task().split("train")))
    chain = Circuit.from_edges(model.graph, [("embeds", "m0"), ("m0", "m1"), ("m1", "resid_post")])
    assert refiner.eliminate(chain, 2) is None


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_regrowing_never_raises_the_training_kl(model, ablation):
    refiner = Refiner(Reference(model, make_task().split("train"), ablation))
    circuit = top_circuit(model.graph, np.random.default_rng(0).normal(size=model.graph.num_edges), 20, ablation)
    regrown = refiner.regrow(circuit, 8, 3)
    assert regrown.num_edges == 20
    assert refiner.kl(regrown) < refiner.kl(circuit)
    assert refiner.regrow(circuit, 8, 0) is circuit


# What single moves end in on the shipped induction model, and the edges that they cannot come to one at a time.
STUCK = (
    "tok_embeds-a0.h0.k tok_embeds-a0.h0.v a0.h0-a1.h0.k a0.h0-a1.h0.v "
    "tok_embeds-a1.h0.q tok_embeds-a1.h0.v a0.h0-resid_post a1.h0-resid_post"
)
PAIR = {("a1.h0", "m1"), ("m1", "resid_post")}


def test_two_edges_that_help_only_together_come_in_together():
    model = load_model("induction-gpt2")
    task = load_task("induction", load_tokenizer("induction-gpt2"), sizes={"train": 16, "test": 1})
    refiner = Refiner(Reference(model, task.split("train")))
    stuck = Circuit.from_edges(model.graph, [tuple(edge.split("-")) for edge in STUCK.split()])
    gradient = refiner._gradient(stuck)
    np.testing.assert_allclose(gradient[[model.graph.edge_id(*edge) for edge in PAIR]], 0, atol=1e-5)
    before = refiner.kl(refiner.swap(stuck, 20))
    found = refiner.finish(stuck, 20)
    assert found.num_edges == stuck.num_edges
    assert set(found.edges) > PAIR
    assert refiner.kl(found) < 0.5 * before


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_lead_through_components_that_the_circuit_does_not_use(name, ablation):
    model = MaskedCausalLM(tiny_model(name, torch.float32))
    refiner = Refiner(Reference(model, make_task().split("train"), ablation))
    circuit = top_circuit(model.graph, np.random.default_rng(2).normal(size=model.graph.num_edges), 12, ablation)
    pairs = joint_pairs(circuit, refiner._gradient, 3)
    assert pairs
    graph, kl = model.graph, refiner.kl(circuit)
    live, _ = graph.live(circuit.keep)
    through = [graph.edge_writers[out] for _, out in pairs]
    assert len(set(through)) == len(pairs) <= 3
    for (into, out), component in zip(pairs, through, strict=True):
        assert not live[component]
        assert (graph.edge_readers[into], component) in set(zip(*graph.feeds, strict=True))
        assert not circuit.keep[[into, out]].any()
        keep = circuit.keep.copy()
        keep[into] = True
        assert refiner.kl(Circuit(graph, keep, ablation=ablation)) == pytest.approx(kl, abs=1e-6)
        assert with_pair(circuit, (into, out)).pruned().num_edges == circuit.num_edges + 2
    joined = refiner.join(circuit, 3)
    assert joined.num_edges == circuit.num_edges
    assert refiner.kl(joined) <= kl


def test_components_that_can_be_fed_nothing_make_no_pair():
    """Without embedding writers nothing leads into the first layer's heads."""
    model = MaskedCausalLM(tiny_model("gpt2", torch.float32), "none")
    graph = model.graph
    used = graph.mlp_writer(0)
    circuit = Circuit(graph, (graph.edge_writers == used) & (graph.edge_readers == graph.num_readers - 1))
    pairs = joint_pairs(circuit, lambda circuit: np.full(graph.num_edges, -1.0), graph.num_writers)
    assert {graph.edge_writers[into] for into, _ in pairs} == {used}
    assert {graph.edge_writers[out] for _, out in pairs} == set(range(used + 1, graph.num_writers))


def test_a_circuit_that_uses_everything_has_no_pairs(model):
    refiner = Refiner(Reference(model, make_task().split("train")))
    full = Circuit.full(model.graph)
    assert joint_pairs(full, refiner._gradient, 3) == []
    assert refiner.join(full, 3) is full

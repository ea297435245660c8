"""Edge faithfulness against a full run per edge."""

import dataclasses

import numpy as np
import pytest

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.edge_faithfulness import edge_faithfulness
from fastcircuit.errors import InputError
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


def without(circuit, edge):
    keep = circuit.keep.copy()
    keep[edge] = False
    return dataclasses.replace(circuit, keep=keep)


@pytest.mark.parametrize(
    ("name", "ablation", "share"), [("gpt2", "interchange", 0.15), ("llama", "zero", 0.6), ("llama", "mean", 0.4)]
)
def test_every_edge_equals_a_run_of_its_own(name, ablation, share, monkeypatch):
    monkeypatch.setattr("fastcircuit.discovery.edge_faithfulness.BATCH_BYTES", 30_000)
    monkeypatch.setattr("fastcircuit.discovery.edge_faithfulness.COPY_BYTES", 30_000)
    model, task = MaskedCausalLM(tiny_model(name)), make_task()
    generator = np.random.default_rng(0)
    circuit = Circuit(model.graph, generator.random(model.graph.num_edges) < share, ablation=ablation)
    full = Circuit.full(model.graph, ablation=ablation)
    found = edge_faithfulness(model, circuit, task)
    assert found.edges == circuit.edges
    assert found.whole == pytest.approx(evaluate(model, circuit, task)["kl"])
    tested = generator.choice(np.flatnonzero(circuit.keep), 12, replace=False)
    places = np.searchsorted(np.flatnonzero(circuit.keep), tested)
    for of, base in ((found.model, full), (found.circuit, circuit)):
        expected = [evaluate(model, without(base, edge), task, metrics=["kl"])["kl"] for edge in tested]
        np.testing.assert_allclose(of[places], expected, rtol=1e-9, atol=1e-12)
    value = found.to_dict()
    assert value["minimality"]["needed"] + value["minimality"]["not_needed"] == circuit.num_edges
    m, c = (values - values.mean() for values in (found.model, found.circuit))
    assert value["correlation"] == pytest.approx(m @ c / np.sqrt((m @ m) * (c @ c)))


def test_all_examples_are_measured_on_unless_fewer_are_asked_for():
    model, task = MaskedCausalLM(tiny_model("gpt2")), make_task(300)
    circuit = Circuit(model.graph, np.random.default_rng(0).random(model.graph.num_edges) < 0.05)
    found = edge_faithfulness(model, circuit, task)
    assert found.examples == 300
    assert found.whole == pytest.approx(evaluate(model, circuit, task)["kl"])
    few = dataclasses.replace(task, splits={**task.splits, "test": task.split("test").select(slice(5))})
    cut = edge_faithfulness(model, circuit, task, most_examples=5)
    assert (cut.examples, cut.whole) == (5, pytest.approx(evaluate(model, circuit, few)["kl"]))
    with pytest.raises(InputError, match="most_examples is 0"):
        edge_faithfulness(model, circuit, task, most_examples=0)


def test_a_circuit_without_edges_is_refused():
    model = MaskedCausalLM(tiny_model("gpt2"))
    with pytest.raises(InputError, match="no edges"):
        edge_faithfulness(model, Circuit(model.graph, np.zeros(model.graph.num_edges, dtype=bool)), make_task())

"""Faithfulness curves, completeness, cross-evaluation and recovery of known circuits, against what they are made of."""

import dataclasses

import numpy as np
import pytest

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import BaselineSettings, Scores, discover
from fastcircuit.discovery.edge_faithfulness import edge_faithfulness
from fastcircuit.errors import InputError
from fastcircuit.evaluation.completeness import completeness
from fastcircuit.evaluation.cross import cross_evaluate
from fastcircuit.evaluation.curve import faithfulness_curve, grid
from fastcircuit.evaluation.faithfulness import evaluate, score
from fastcircuit.evaluation.reference import Reference
from fastcircuit.evaluation.truth import Truth, compare_with_truth, heads_rates, rates, roc, truth_roc
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return MaskedCausalLM(tiny_model("llama"))


def nested(model, *shares):
    """Random circuits of these shares of all edges, each within the next."""
    draws = np.random.default_rng(0).random(model.graph.num_edges)
    return [Circuit(model.graph, draws < share) for share in shares]


def test_the_grid_is_mibs():
    assert grid(32_491) == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]
    assert grid(32) == [0, 0, 0, 0, 0, 1, 3, 6, 16, 32]


def test_areas_are_of_trapezoids(model):
    task, circuits = make_task(), nested(model, 0.5, 0.2)
    found = faithfulness_curve(model, circuits, task)
    empty = Circuit(model.graph, np.zeros(model.graph.num_edges, dtype=bool))
    family = [empty, circuits[1], circuits[0], Circuit.full(model.graph)]
    nothing, *values = (evaluate(model, circuit, task)["logit_difference"] for circuit in family)
    share = [(value - nothing) / (values[-1] - nothing) for value in values]
    x = [circuit.num_edges / model.graph.num_edges for circuit in family[1:]]
    assert [point["faithfulness"] for point in found.points] == pytest.approx(share)
    assert share[-1] == 1
    pieces = [(x[i + 1] - x[i]) / 2 for i in range(2)]
    assert found.cpr == pytest.approx(sum(w * (share[i] + share[i + 1]) for i, w in enumerate(pieces)))
    gaps = [abs(1 - value) for value in share]
    assert found.cmd == pytest.approx(sum(w * (gaps[i] + gaps[i + 1]) for i, w in enumerate(pieces)))


def test_areas_over_nominal_fractions(model):
    task, circuits = make_task(), nested(model, 0.2, 0.5)
    plain = faithfulness_curve(model, circuits, task)
    found = faithfulness_curve(model, circuits, task, fractions=(0.01, 0.3))
    assert [point["fraction"] for point in found.points] == [0.01, 0.3, 1]
    (small, large, _) = (point["faithfulness"] for point in found.points)
    assert [point["faithfulness"] for point in plain.points] == [small, large, 1]
    assert found.cpr == pytest.approx(0.29 * (small + large) / 2 + 0.7 * (large + 1) / 2)
    with pytest.raises(InputError, match="1 fractions for 2 circuits; give one each, ascending"):
        faithfulness_curve(model, circuits, task, fractions=(0.5,))


def test_intervals_of_the_areas_hold_the_areas(model):
    found = faithfulness_curve(model, nested(model, 0.3), make_task(), resamples=100).to_dict()
    plain = faithfulness_curve(model, nested(model, 0.3), make_task())
    assert found["cpr"]["mean"] == plain.cpr
    assert found["cmd"]["low"] <= found["cmd"]["high"]


def test_families_that_make_no_curve_are_refused(model):
    task = make_task()
    with pytest.raises(InputError, match="no circuits"):
        faithfulness_curve(model, [], task)
    with pytest.raises(InputError, match=r"different ablations \(interchange, zero\)"):
        faithfulness_curve(model, [Circuit.full(model.graph), Circuit.full(model.graph, ablation="zero")], task)
    with pytest.raises(InputError, match=r"kl compares a circuit with the model, .* use accuracy, logit"):
        faithfulness_curve(model, nested(model, 0.3), task, metric="kl")
    with pytest.raises(InputError, match="this model has"):
        faithfulness_curve(model, [Circuit.full(Graph(2, 2, 2))], task)


def test_completeness_removes_the_same_from_both(model):
    (circuit,), task = nested(model, 0.4), make_task()
    found = completeness(model, circuit, task, metric="accuracy", subsets=3, seed=1)
    assert completeness(model, circuit, task, metric="accuracy", subsets=3, seed=1) == found
    removed = [row["removed"] for row in found["subsets"]]
    assert removed[0] == 0
    assert removed[-1] == circuit.num_edges
    assert removed == sorted(removed)
    first, last = found["subsets"][0], found["subsets"][-1]
    assert first["circuit"] == evaluate(model, circuit, task)["accuracy"]
    assert last["model"] == evaluate(model, Circuit.full(model.graph) - circuit, task)["accuracy"]
    assert completeness(model, Circuit.full(model.graph), task, subsets=2)["worst"] == 0
    with pytest.raises(InputError, match="needs a circuit with edges"):
        completeness(model, circuit - circuit, task)


def test_cross_evaluation_has_every_circuit_on_every_task(model):
    circuits = dict(zip("ab", nested(model, 0.5, 0.3), strict=True))
    tasks = {"one": make_task(), "two": make_task(seed=1)}
    rows = cross_evaluate(model, circuits, tasks, metrics=["kl", "accuracy"])
    assert [(row["circuit"], row["task"]) for row in rows] == [
        (name, task) for task in tasks for name in ("full model", "a", "b", "intersection", "union")
    ]
    by = {(row["circuit"], row["task"]): row for row in rows}
    assert by["full model", "two"]["kl"] == pytest.approx(0, abs=1e-9)
    assert by["b", "two"]["kl"] == pytest.approx(evaluate(model, circuits["b"], tasks["two"])["kl"])
    assert by["intersection", "one"]["kl"] == by["b", "one"]["kl"]  # b is within a
    with pytest.raises(InputError, match="of one ablation"):
        cross_evaluate(model, {"a": circuits["a"], "z": Circuit.full(model.graph, ablation="zero")}, tasks)


def test_the_output_bias_goes_where_the_circuit_says():
    model, task = MaskedCausalLM(tiny_model("gpt2")), make_task()
    settings = BaselineSettings(ablation="zero", output_bias="kept")
    kept = discover(model, task, "random", sparsity=0.5, settings=settings).circuit
    split = dataclasses.replace(kept, output_bias="split")
    reference = Reference(model, task.split("test"), "zero", "kept")
    expected = pytest.approx(score(reference, Masks.from_circuit(kept))["kl"])
    found = evaluate(model, kept, task)
    assert found["kl"] == expected != evaluate(model, split, task)["kl"]
    assert edge_faithfulness(model, kept, task).whole == expected
    assert cross_evaluate(model, {"kept": kept}, {"pairs": task})[1]["kl"] == expected
    whole = completeness(model, kept, task, metric="logit_difference", subsets=0)["subsets"][0]["circuit"]
    curve = faithfulness_curve(model, [kept], task, metric="logit_difference")
    assert whole == curve.points[0]["logit_difference"] == found["logit_difference"]
    scores = Scores(model.graph, kept.keep.astype(float), np.zeros(model.graph.num_writers), "zero", "kept")
    assert {scores.circuit(5).output_bias, scores.node_circuit(2).output_bias} == {"kept"}
    with pytest.raises(InputError, match=r"different ablations \(zero, zero with the output bias kept\)"):
        cross_evaluate(model, {"kept": kept, "split": split}, {"pairs": task})


def test_roc_by_hand():
    truth = np.array([True, True, False, False, False])
    found = roc(np.array([0.9, 0.5, 0.5, 0.1, -3.0]), truth)
    assert found.true_positive_rate.tolist() == pytest.approx([0, 0.5, 1, 1, 1])
    assert found.false_positive_rate.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    # Of the six pairs of one in and one out, five are in the right order and one is tied.
    assert found.auc == pytest.approx(5.5 / 6)
    assert found.to_dict()["thresholds"] == [None, 0.9, 0.5, 0.1, -3.0]
    assert rates(np.array([True, False, True, False, False]), truth) == {"tpr": 0.5, "fpr": 1 / 3, "precision": 0.5}
    with pytest.raises(InputError, match="1 of 5 scores are NaN"):
        roc(np.array([1, np.nan, 0, 0, 0]), truth)
    with pytest.raises(InputError, match="holds 5 of 5"):
        roc(np.arange(5.0), np.ones(5, dtype=bool))


def test_known_circuits_by_name_and_file(tmp_path):
    graph = Graph(12, 12, 12, "split")
    ioi = Truth.load("ioi", graph)
    assert int(ioi.writers[ioi.scope].sum()) >= 26
    heads_only = Truth.load("acronyms", graph)
    assert heads_only.edges is None
    assert len(heads_only.scope) == 144
    kept = [[], [0], [2], [], [11], [8], [], [], [11], [9], [10], [4]]  # those of the paper
    assert heads_rates(kept, heads_only) == {"tpr": 1, "fpr": 0, "precision": 1}
    circuit = Circuit.from_edges(graph, [("a8.h11", "a9.h9.v"), ("a9.h9", "resid_post"), ("m0", "resid_post")])
    found = compare_with_truth(circuit, heads_only)
    assert found["edges"] is None
    assert found["nodes"]["tpr"] == 2 / 8
    circuit.save(tmp_path / "own.json")
    own = Truth.load(str(tmp_path / "own.json"), graph)
    assert compare_with_truth(circuit, own)["edges"] == {"tpr": 1, "fpr": 0, "precision": 1}
    curves = truth_roc(circuit.keep.astype(float), circuit.writer_kept.astype(float), own)
    assert (curves["edges"].auc, curves["nodes"].auc) == (1, 1)
    with pytest.raises(InputError, match="no manual circuit and no file 'iou'; manual circuits are acronyms, "):
        Truth.load("iou", graph)

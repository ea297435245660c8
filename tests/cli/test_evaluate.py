"""``fastcircuit evaluate``."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fastcircuit.circuit import Circuit
from fastcircuit.evaluation.curve import grid
from fastcircuit.evaluation.manual_circuits import manual_circuit
from fastcircuit.evaluation.truth import roc
from fastcircuit.formats import read
from fastcircuit.graph import Graph
from tests.cli.calls import WORDS, pairs, save_tiny, write_pairs
from tests.cli.test_convert import REAL


def test_evaluate(shelf, finished, run, answer):
    arguments = ["evaluate", shelf / "gpt2", finished / "circuit.json", "--data", shelf / "pairs.jsonl"]
    found = answer(*arguments)
    assert found["test"] == Circuit.load(finished / "circuit.json").metrics["test"]
    assert {"edges", "total_edges", "sparsity", "train"} < set(answer(*arguments, "--split", "train"))
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "accuracy" in out


def test_evaluate_reads_a_plain_edge_list(shelf, finished, answer):
    circuit = Circuit.load(finished / "circuit.json")
    circuit.save_edge_list("edges.json")
    arguments = ["--data", shelf / "pairs.jsonl", "--embedding-nodes", "split"]
    assert answer("evaluate", shelf / "gpt2", "edges.json", *arguments)["test"] == circuit.metrics["test"]


def test_metrics_and_intervals(shelf, finished, run, answer):
    arguments = ["evaluate", shelf / "gpt2", finished / "circuit.json", "--data", shelf / "pairs.jsonl"]
    found = answer(*arguments, "--metrics", "exact_match, kl", "--bootstrap", 50)
    assert set(found["test"]) == {"exact_match", "kl", "examples", "intervals"}
    assert set(found["conventions"]) == {"split", "joint", "none"}
    code, out, _ = run(*arguments, "--metrics", "kl", "--bootstrap", 50)
    low, high = found["test"]["intervals"]["kl"]
    assert code == 0
    assert f"({low:.4f} to {high:.4f})" in " ".join(out.split())


def test_analyses(shelf, finished, run, answer, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", ({**row, "distractor": "Anna"} for row in pairs()))
    arguments = ["evaluate", shelf / "gpt2", finished / "circuit.json", "--data", tmp_path / "pairs.jsonl"]
    asked = ["--scores", finished / "masks.safetensors", "--truth", finished / "circuit.json", "--completeness", 1]
    found = answer(*arguments, *asked, "--edge-faithfulness", "edges.csv")
    assert found["truth"]["edges"] == {"tpr": 1, "fpr": 0, "precision": 1}
    assert 0.5 < found["roc"]["edges"]["auc"] <= 1  # the circuit is made of the edges with the highest log-alphas
    points = found["faithfulness"]["points"]
    assert points[-1]["faithfulness"] == 1
    assert [point["fraction"] for point in points] == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    assert all(point["edges"] <= int(point["fraction"] * found["total_edges"]) for point in points)
    assert len(found["completeness"]["subsets"]) == 3
    measured = found["edge_faithfulness"]
    assert measured["kl"] == pytest.approx(found["test"]["kl"], abs=1e-6)  # float32 log-probabilities of about 5
    assert sorted(path.name for path in Path().iterdir()) == ["edges.csv", "edges.png", "edges.svg"]
    assert len(Path("edges.csv").read_text().splitlines()) == 1 + found["edges"]
    code, out, _ = run(*arguments, *asked)
    assert code == 0
    assert "CPR" in out
    assert "incompleteness" in out


def test_a_circuit_of_another_model_of_this_shape_is_warned_of(shelf, finished, run):
    tail = ["--data", shelf / "pairs.jsonl"]
    os.symlink(shelf / "gpt2", "same")
    assert run("evaluate", "same", finished / "circuit.json", *tail)[::2] == (0, "")
    save_tiny(Path("tuned"), "gpt2")
    where = finished / "circuit.json"
    line = f"warning: {where} was found in {shelf / 'gpt2'}, and is run on tuned; unless their weights are the same, "
    code, out, err = run("evaluate", "tuned", where, *tail)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith(line)
    assert "accuracy" in out
    code, _, err = run("compare", where, where, "--model", "tuned", "--tasks", shelf / "pairs.jsonl")
    assert code == 0
    assert [each.startswith(line) for each in err.splitlines() if "warning" in each] == [True, True]


@pytest.mark.parametrize("form", ["json", "ours"])
def test_scores_of_another_tool(answer, tmp_path, form):
    """A real file of EAP-IG: GPT-2 small's 32,491 edges, on a model as deep and a number wide per head."""
    model, graph = tmp_path / "gpt2", Graph(12, 12, 12, "joint")
    save_tiny(model, "gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=24, n_layer=12, n_head=12, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(model)
    write_pairs("pairs.jsonl", ({**row, "distractor": "Anna"} for row in pairs()))
    answer("convert", REAL, "circuit.json")
    scores, real = REAL if form == "json" else "circuit.json", read(REAL)
    Circuit(graph, real.circuit.keep).save("own.json")  # it does not say that its model is 768 wide
    found = answer("evaluate", model, "own.json", "--data", "pairs.jsonl", "--scores", scores, "--truth", "ioi")
    sizes = [point["edges"] for point in found["faithfulness"]["points"]]
    assert sizes == [real.top(size).pruned().num_edges for size in grid(graph.num_edges)]
    assert {"cpr", "cmd"} < set(found["faithfulness"])
    truth = manual_circuit("ioi", graph).circuit
    assert found["roc"]["edges"]["auc"] == roc(np.abs(real.edge_scores), truth.keep).auc > 0.5
    assert found["roc"]["nodes"]["auc"] > 0.5


def test_scores_that_are_nan(shelf, finished, refuses, tmp_path):
    tensors = load_file(finished / "masks.safetensors")
    tensors["edge"][7] = float("nan")
    wrong = tmp_path / "nan.safetensors"
    save_file(tensors, wrong)
    refuses(
        f"evaluate {{shelf}}/gpt2 {{run}}/circuit.json --data {{shelf}}/pairs.jsonl --scores {wrong}",
        "nan.safetensors: 1 edge scores are NaN, the first of ",
    )


def test_a_circuit_with_an_edge_backwards(shelf, finished, refuses, tmp_path):
    value = json.loads((finished / "circuit.json").read_text())
    value["edges"].append(["a1.h0", "m0"])
    (tmp_path / "back.json").write_text(json.dumps(value))
    refuses(
        f"evaluate {{shelf}}/gpt2 {tmp_path}/back.json --data {{shelf}}/pairs.jsonl",
        "back.json: no edge a1.h0 -> m0: a1.h0 is not computed before m0",
    )


BAD_CALLS = {
    "nothing to recover": (
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --scores {run}/masks.safetensors",
        "faithfulness needs them to differ, give the task distractors",
    ),
    # what: the command, exit code 2; what the line says
    "circuit": ("evaluate {shelf}/gpt2 nothing.json --task pronoun", "circuit file nothing.json does not exist"),
    "no circuit": ("evaluate {shelf}/gpt2 {shelf}/pairs.jsonl --task pronoun", "pairs.jsonl is not valid JSON (line 2"),
    "another model's circuit": ("evaluate {shelf}/llama {run}/circuit.json --data {shelf}/pairs.jsonl", "the circuit "),
    "split": ("evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --split dev", "has no split 'dev'"),
    "metric": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --metrics mrr", "no metric 'mrr'; metrics are kl,"),
    "no metric": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --metrics ,", "no metric is named"),
    "order": (
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --metrics probability_difference_10",
        "needs answers that have an order, which task pairs has not",
    ),
    "confidence": (
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --bootstrap 9 --confidence 95",
        "confidence is 95",
    ),
    "truth": (
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --truth ioi",
        "manual circuit ioi is of GPT-2 small",
    ),
    "scores": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --scores no.safetensors", "does not exist"),
    "no scores": (
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --scores {shelf}/gpt2/model.safetensors",
        "it needs a tensor edge, and may have a tensor node",
    ),
    "scores of another model": (
        f"evaluate {{shelf}}/gpt2 {{run}}/circuit.json --data {{shelf}}/pairs.jsonl --scores {REAL}",
        "it is over 12 layers of 12 heads",
    ),
    "seed": ("evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --seed -1", "seed is -1; it must"),
    "idle number": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --most-examples 9", "give both"),
    "idle option": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --signed", "give both"),
    "file of edges": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --edge-faithfulness e.txt", "end in .csv"),
    "circuit of own data": ("evaluate {shelf}/gpt2 {run}/circuit.json", "no task 'pairs'; tasks: acronyms"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)

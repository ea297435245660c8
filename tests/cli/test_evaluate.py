"""``fastcircuit evaluate``."""

import os
from pathlib import Path

import pytest

from fastcircuit.circuit import Circuit
from tests.cli.calls import pairs, save_tiny, write_pairs


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
    assert found["faithfulness"]["points"][-1]["faithfulness"] == 1
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
        "evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --scores {run}/circuit.json",
        "needs tensors edge and node",
    ),
    "seed": ("evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --seed -1", "seed is -1; it must"),
    "idle option": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --signed", "give both"),
    "file of edges": ("evaluate {shelf}/gpt2 {run}/circuit.json --task ioi --edge-faithfulness e.txt", "end in .csv"),
    "circuit of own data": ("evaluate {shelf}/gpt2 {run}/circuit.json", "no task 'pairs'; tasks: acronyms"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)

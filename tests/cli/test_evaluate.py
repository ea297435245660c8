"""``fastcircuit evaluate``."""

import pytest

from fastcircuit.circuit import Circuit


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


BAD_CALLS = {
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
    "circuit of own data": ("evaluate {shelf}/gpt2 {run}/circuit.json", "no task 'pairs'; tasks: acronyms"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)

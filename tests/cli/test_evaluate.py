"""``fastcircuit evaluate``."""

import pytest

from fastcircuit.circuit import Circuit


def test_evaluate(shelf, finished, run, answer):
    arguments = ["evaluate", shelf / "gpt2", finished / "circuit.json", "--data", shelf / "pairs.jsonl"]
    found = answer(*arguments)
    assert found["test"] == Circuit.load(finished / "circuit.json").metrics["test"]
    assert set(answer(*arguments, "--split", "train")) == {"edges", "total_edges", "sparsity", "train"}
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "accuracy" in out


def test_evaluate_reads_a_plain_edge_list(shelf, finished, answer):
    circuit = Circuit.load(finished / "circuit.json")
    circuit.save_edge_list("edges.json")
    arguments = ["--data", shelf / "pairs.jsonl", "--embedding-nodes", "split"]
    assert answer("evaluate", shelf / "gpt2", "edges.json", *arguments)["test"] == circuit.metrics["test"]


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "circuit": ("evaluate {shelf}/gpt2 nothing.json --task pronoun", "circuit file nothing.json does not exist"),
    "no circuit": ("evaluate {shelf}/gpt2 {shelf}/pairs.jsonl --task pronoun", "pairs.jsonl is not valid JSON (line 2"),
    "another model's circuit": ("evaluate {shelf}/llama {run}/circuit.json --data {shelf}/pairs.jsonl", "the circuit "),
    "split": ("evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --split dev", "has no split 'dev'"),
    "circuit of own data": ("evaluate {shelf}/gpt2 {run}/circuit.json", "no task 'pairs'; tasks: acronyms"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)

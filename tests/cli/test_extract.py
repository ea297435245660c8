"""``fastcircuit extract``."""

import json
import os

import pytest
from transformers import AutoModelForCausalLM

from tests.cli.calls import pairs, write_pairs


def test_extract_writes_a_model_that_loads(shelf, run):
    arguments = ("--data", shelf / "pairs.jsonl", "--threshold", "1e-7", "--out", "sub")
    code, out, err = run("extract", shelf / "gpt2", *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"extract", "directory"}
    assert {"heads", "mlps", "parameters", "test", "speed"} <= set(found["extract"])
    assert AutoModelForCausalLM.from_pretrained(found["directory"]).config.model_type == "fastcircuit"
    code, out, err = run("extract", shelf / "gpt2", *arguments)
    assert (code, out) == (2, "")
    assert "sub exists already" in err


def test_extract_that_leaves_nothing_says_so_and_writes_nothing(shelf, run):
    code, out, err = run("extract", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--threshold", "9", "--out", "sub")
    assert (code, out) == (2, "")
    assert "prunes every head and MLP" in err.splitlines()[-1]
    assert os.listdir() == []


def test_mean_positional_of_unequal_prompts_is_refused(shelf, run):
    rows = [
        {"clean": pair["clean"].replace("saw the", "saw"), "corrupted": pair["corrupted"].replace("saw the", "saw")}
        for pair in pairs()
    ]
    write_pairs("uneven.jsonl", [*rows, *pairs()])
    code, out, err = run(
        "extract", shelf / "gpt2", "--data", "uneven.jsonl", "--ablation", "mean-positional", "--out", "sub"
    )
    assert (code, out) == (2, "")
    assert "needs prompts of equal length" in err
    assert os.listdir() == ["uneven.jsonl"]


def test_extract_of_a_circuit_prints_tables(shelf, finished, run):
    pairs, circuit = shelf / "pairs.jsonl", finished / "circuit.json"
    code, out, err = run("extract", shelf / "gpt2", "--data", pairs, "--circuit", circuit, "--out", "sub")
    assert code == 0, err
    assert "KL(edge circuit || submodel), nats" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "ablation to extract": (
        "extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --out sub --ablation none",
        "ablation is 'none'",
    ),
    "threshold": ("extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --out sub --threshold 0", "threshold is 0"),
    "extract out": ("extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --out {shelf}", "exists already"),
    "extract of another model's circuit": (
        "extract {shelf}/llama --data {shelf}/pairs.jsonl --circuit {run}/circuit.json --out sub",
        "the circuit ",
    ),
    "circuit and threshold": (
        "extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --circuit {run}/circuit.json --threshold 0.01 --out sub",
        "--threshold: with --circuit the circuit says what is kept",
    ),
    "circuit, budgets, no MLPs": (
        "extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --circuit {run}/circuit.json --no-mlps --kl-budget 1 "
        "--size-budget 0.5 --out sub",
        "--kl-budget, --size-budget, --no-mlps: with --circuit",
    ),
    "circuit, answers only": (
        "extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --circuit {run}/circuit.json --answers-only --out sub",
        "task pairs names no answer tokens",
    ),
    "size budget": (
        "extract {shelf}/gpt2 --data {shelf}/pairs.jsonl --out sub --size-budget 1.5",
        "size_budget is 1.5",
    ),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)

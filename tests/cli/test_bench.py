"""``fastcircuit bench``."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def submodel(shelf, run):
    """A submodel ``sub`` of the tiny GPT-2 that takes at most 5 tokens."""
    arguments = ("--data", shelf / "pairs.jsonl", "--ablation", "mean-positional", "--threshold", "1e-7")
    code, out, err = run("extract", shelf / "gpt2", *arguments, "--out", "sub", "--json")
    assert code == 0, err
    assert {row["tokens"] for row in json.loads(out)["extract"]["speed"]} == {5}
    return Path("sub")


def test_submodel_is_timed_on_as_many_tokens_as_it_takes(submodel, run):
    code, out, err = run("bench", "submodel", submodel, "--rounds", "2", "--no-compiled", "--json")
    assert code in (0, 1), err  # 1: a busy machine measured more than the bound, which is said after the rows
    rows = json.loads(out)["rows"]
    assert [(row["phase"], row["batch"], row["tokens"]) for row in rows] == [("prefill", b, 5) for b in (1, 8, 32)]
    progress = [line.split()[:2] for line in err.splitlines() if not line.startswith("error: ")]
    assert progress == [["time", "1/3"], ["time", "2/3"], ["time", "3/3"]]


def test_where_the_original_is_not_any_more(submodel, shelf, refuses):
    config = json.loads((submodel / "config.json").read_text())
    config["source"]["model"] = "./moved"
    (submodel / "config.json").write_text(json.dumps(config))
    refuses("bench submodel sub", "sub came from './moved', but no such model directory: ./moved; name that model with")
    refuses("bench submodel sub --original ./gone", "error: no such model directory: ./gone\n")
    config["source"]["model"] = None
    (submodel / "config.json").write_text(json.dumps(config))
    refuses("bench submodel sub", "sub does not say what model it came from; name it with --original")
    refuses("bench submodel sub --original stories260K", "the models have vocabularies of 512 and 41 tokens")


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "suite": ("bench nothing", "No such command 'nothing'"),
    "no directory": ("bench submodel", "Missing argument"),
    "wrong directory": (
        "bench submodel nothing",
        "no such directory: nothing; name one that `fastcircuit extract` wrote",
    ),
    "wrong path": ("bench submodel /no/thing", "no such model directory: /no/thing"),
    "empty directory": ("bench submodel .", "there is no config.json in it"),
    "another model": ("bench submodel {shelf}/gpt2", "holds a model of type 'gpt2', not a submodel"),
    "tokens": ("bench submodel sub --tokens 3", "Invalid value for '--tokens'"),
    "rounds": ("bench submodel sub --rounds 1", "Invalid value for '--rounds'"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)


def test_damaged_weights_are_refused(submodel, refuses):
    whole = (submodel / "model.safetensors").read_bytes()
    (submodel / "model.safetensors").write_bytes(whole[:-10])
    refuses("bench submodel sub", "cannot load submodel 'sub': ")

"""``fastcircuit discover``: what it writes, and how it stops and goes on.

The interrupted run is a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastcircuit
from fastcircuit.circuit import Circuit
from fastcircuit.errors import RunError
from fastcircuit.models.masked import MaskedCausalLM
from tests.cli.calls import QUICK, pairs, write_pairs


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_discover_writes_what_it_says(shelf, run, name):
    code, out, err = run("discover", shelf / name, "--data", shelf / "pairs.jsonl", *QUICK, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["files"] == [f"runs/{name}-pairs/circuit.json", f"runs/{name}-pairs/masks.safetensors"]
    assert sorted(map(str, Path("runs").rglob("*.*"))) == found["files"]
    circuit = Circuit.load(found["files"][0])
    assert circuit.num_edges == found["discover"]["edges"] == 40
    assert circuit.graph.num_edges == found["discover"]["total_edges"]
    assert circuit.metrics["test"] == found["discover"]["test"]
    assert set(found["discover"]) == {"edges", "total_edges", "sparsity", "test", "seconds"}
    lines = [line.split()[:2] for line in err.splitlines()]
    assert [line for line in lines if line[0] == "discover"] == [["discover", "10/12"], ["discover", "12/12"]]
    assert {line[0] for line in lines} >= {"discover", "eliminate", "swap"}


def test_discover_prints_a_table(shelf, run):
    code, out, _ = run("discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", "run")
    assert code == 0
    assert "40 of " in out
    assert "on 3 prompts" in out
    assert "wrote run/circuit.json, run/masks.safetensors" in out


def test_settings_of_other_methods(shelf, answer):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--method", "eap-ig", "--edges", "40"]
    found = answer(*arguments, "--keep-dangling", "--most-examples", "2", "--out", "run")
    circuit = Circuit.load("run/circuit.json")
    assert found["discover"]["edges"] == 40 > circuit.pruned().num_edges
    settings = circuit.provenance["settings"]
    assert (settings["pruned"], settings["most_examples"]) == (False, 2)


def test_a_finished_run_is_replaced_only_when_asked(shelf, finished, run):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--seed", "1", "--out", "run"]
    Path("run").mkdir()
    (Path("run") / "circuit.json").write_bytes((finished / "circuit.json").read_bytes())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err == "error: run holds a finished run; choose another --out, or --overwrite to replace it\n"
    assert (Path("run") / "circuit.json").read_bytes() == (finished / "circuit.json").read_bytes()
    assert run(*arguments, "--overwrite")[0] == 0
    assert Circuit.load("run/circuit.json").provenance["settings"]["seed"] == 1


def test_an_interrupted_run_resumes_to_what_the_uninterrupted_one_finds(shelf, run):
    arguments = [
        "discover",
        str(shelf / "gpt2"),
        "--data",
        str(shelf / "pairs.jsonl"),
        "--edges",
        "40",
        "--steps",
        "200",
    ]
    arguments += ["--batch-size", "4"]
    path = os.pathsep.join([str(Path(fastcircuit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fastcircuit", *arguments, "--out", "stopped", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert first.startswith("discover 20/200  KL ")
    assert (process.returncode, out) == (1, "")
    assert "error: interrupted after step" in err.splitlines()[-1]
    assert "resume from stopped/checkpoint.safetensors" in err.splitlines()[-1]
    assert os.listdir("stopped") == ["checkpoint.safetensors"]

    code, _, err = run(*arguments, "--out", "stopped")
    assert code == 2
    assert "holds an interrupted run" in err
    assert run(*arguments, "--out", "stopped", "--resume")[0] == 0
    assert run(*arguments, "--out", "whole")[0] == 0
    assert sorted(os.listdir("stopped")) == ["circuit.json", "masks.safetensors"]
    assert Path("stopped/circuit.json").read_bytes() == Path("whole/circuit.json").read_bytes()
    stopped, whole = load_file("stopped/masks.safetensors"), load_file("whole/masks.safetensors")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_tensorboard_scalars_can_be_read_back(shelf, answer):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--tensorboard", "--out", "run"]
    answer(*arguments)
    events = accumulator.EventAccumulator("run/tensorboard")
    events.Reload()
    names = ("kl", "penalty", "edge_sparsity", "edge_target")
    assert sorted(events.Tags()["scalars"]) == sorted(names)
    history = load_file("run/masks.safetensors")["history"]
    for column, name in enumerate(names, start=1):
        written = events.Scalars(name)
        assert [event.step for event in written] == [9, 11]
        assert [event.value for event in written] == pytest.approx(history[[9, 11], column].tolist())


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "method": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --method magic", "no method 'magic'"),
    "preset": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --preset magic", "no preset 'magic'; presets are ioi"),
    "steps": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --steps 0", "steps is 0; it must be at least 1"),
    "sparsity": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --sparsity 1.5", "sparsity is 1.5; it must be in"),
    "no sparsity": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --sparsity -0.1", "sparsity is -0.1"),
    "edges": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --edges 9999", "9999"),
    "both": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --edges 9 --sparsity 0.9", "not both"),
    "out in a file": ("discover {shelf}/gpt2 --task pronoun --out {shelf}/pairs.jsonl/run", "Not a directory"),
    "out is a file": ("discover {shelf}/gpt2 --task pronoun --out {shelf}/pairs.jsonl", "is a file; name a directory"),
    "nothing to resume": (
        "discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --out new --resume",
        "no checkpoint new/checkpoint.safetensors to resume from",
    ),
    "both directions": (
        "discover {shelf}/gpt2 --task pronoun --both-directions --ablation zero",
        "both_directions is for interchange ablation",
    ),
    "both directions of a published run": (
        "discover {shelf}/gpt2 --task pronoun --both-directions --upstream-compat",
        "both_directions is not part of the published method",
    ),
    "both directions of an attribution": (
        "discover {shelf}/gpt2 --task pronoun --method eap --both-directions",
        "no setting 'both_directions'",
    ),
    "step": ("discover {shelf}/gpt2 --task pronoun --step magic", "step is 'magic'; accepted: auto, dynamic"),
    "graph": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --step graph", "step 'graph' needs a CUDA device"),
    "micro-batch": ("discover {shelf}/gpt2 --task pronoun --micro-batch 0", "micro_batch is 0; it must be at least 1"),
    "dry run": ("discover {shelf}/nothing --task pronoun --dry-run", "no such model directory"),
    "seed": ("discover {shelf}/gpt2 --task pronoun --seed -1", "seed is -1; it must be 0 or more, and less than 2^63"),
    "large seed": ("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --seed 9223372036854775808", "less than 2^63"),
    "seed of an attribution": ("discover {shelf}/gpt2 --task pronoun --method random --seed -1", "seed is -1"),
    "resume, overwrite": ("discover {shelf}/gpt2 --task pronoun --resume --overwrite", "contradict each other"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)


def test_a_damaged_checkpoint_is_refused(refuses):
    Path("run").mkdir()
    Path("run/checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
    refuses(
        "discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --out run --resume",
        "checkpoint run/checkpoint.safetensors is damaged",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(refuses):
    refuses("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --device cuda", "device cuda is not available here")


def test_a_full_disk_leaves_nothing_half_written(shelf, run, full_disk):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", full_disk / "run"]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert "No space left on device" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith(f"error: cannot write {full_disk}/run/checkpoint.safetensors: ")
    assert [path for path in full_disk.rglob("*") if path.is_file()] == []


def test_a_circuit_that_cannot_be_evaluated_is_kept(shelf, run, monkeypatch):
    def final_read(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(MaskedCausalLM, "final_read", final_read)
    code, out, err = run(
        "discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--method", "random", "--edges", "9", "--out", "a"
    )
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "out of memory in evaluation: going on with 1 examples at a time"
    assert err.splitlines()[-1].startswith("error: evaluation: out of memory with one example at a time; ")
    assert err.splitlines()[-1].endswith("; the circuit is in a/circuit.json, without metrics")
    assert sorted(os.listdir("a")) == ["circuit.json", "masks.safetensors"]
    assert (Circuit.load("a/circuit.json").num_edges, Circuit.load("a/circuit.json").metrics) == (9, {})


def test_masks_are_not_left_without_their_circuit(shelf, run, monkeypatch):
    def full(path, *_):
        raise RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("fastcircuit.circuit.write_json", full)
    code, out, err = run(
        "discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--method", "random", "--edges", "9", "--out", "a"
    )
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: cannot write a/circuit.json: No space left on device"
    assert os.listdir("a") == []


def test_a_directory_that_may_not_be_written_is_refused_at_once(refuses):
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("the superuser may write anywhere")
    refuses(
        "discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --out locked/run",
        "cannot write into locked/run: Permission denied",
    )


@pytest.mark.parametrize("method", ["eap", "eap-ig", "acdc"])
def test_other_methods(shelf, run, method):
    size = ["--threshold", "0.0005"] if method == "acdc" else ["--edges", "40"]
    code, out, err = run(
        "discover", shelf / "llama", "--data", shelf / "pairs.jsonl", "--method", method, *size, "--json",
        *(["--loss", "nll"] if method == "eap" else []),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    circuit = Circuit.load(found["files"][0])
    assert circuit.provenance["method"] == method
    assert circuit.num_edges == found["discover"]["edges"]
    assert load_file(found["files"][1])["edge"].shape == (circuit.graph.num_edges,)
    if method != "acdc":
        assert circuit.num_edges == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "methods are edge-pruning, eap"),
        (["--method", "acdc", "--threshold", "-1"], "acdc needs a KL rise in nats, 0 or more"),
        (["--method", "eap-ig", "--edges", "100000"], "edges to keep"),
        (["--method", "eap-ig", "--preset", "ioi"], "presets are of edge-pruning"),
        (["--method", "eap"], "use loss nll"),
        (["--warm-start", "magic"], "warm_start is 'magic'; accepted: eap, eap-ig"),
        (["--nodes", "3"], "no setting 'nodes'"),
        (["--method", "eap", "--dry-run"], "--dry-run is for edge-pruning, which takes steps; with method eap leave"),
        (["--method", "acdc", "--micro-batch", "2"], "--micro-batch is for edge-pruning"),
        (["--method", "random", "--step", "fixed"], "--step is for edge-pruning"),
        (["--method", "eap-ig", "--tensorboard"], "--tensorboard is for edge-pruning"),
    ],
)
def test_options_that_do_not_fit_a_method(shelf, run, options, message):
    code, out, err = run("discover", shelf / "llama", "--data", shelf / "pairs.jsonl", *options)
    assert code == 2
    assert not out
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_discover_within_a_budget_says_how_many_edges_that_takes(run):
    program = ("tracr-xproportion", "--task", "tracr-xproportion", "--preset", "tracr", "--steps", "40")
    code, out, err = run("discover", *program, "--kl-budget", "0.01", "--out", "budget", "--json")
    assert code == 0, err
    found = json.loads(out)["discover"]
    assert found["edges"] == 7
    assert found["test"]["kl"] < 1e-6
    assert json.loads(Path("budget/circuit.json").read_text())["provenance"]["kl_budget"] == 0.01


def test_a_dry_run_prints_the_plan_and_runs_nothing(shelf, run, answer):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--batch-size", "4", "--dry-run"]
    found = answer(*arguments)["plan"]
    assert (found["device"], found["micro_batch"], found["recompute"], found["fits"]) == ("cpu", 4, False, True)
    parts = [found[name] for name in ("weights", "cache", "learned", "step")]
    assert found["total"] == sum(parts)
    assert min(parts) > 0
    code, out, _ = run(*arguments)
    assert code == 0
    assert "4 examples at a time" in out
    assert os.listdir() == []


def test_a_dry_run_is_of_the_step_and_micro_batch_that_were_asked_for(shelf, answer, refuses):
    write_pairs("pairs.jsonl", of_many_lengths(pairs()))
    arguments = ["discover", shelf / "gpt2", "--data", "pairs.jsonl", "--batch-size", "4", "--dry-run"]
    whole, part, fixed, more = (
        answer(*arguments, *options)["plan"]
        for options in ([], ["--micro-batch", "3"], ["--step", "fixed", "--micro-batch", "3"], ["--micro-batch", "9"])
    )
    assert (part["micro_batch"], part["recompute"]) == (3, False)
    assert part["tokens"] < whole["tokens"]
    assert part["step"] < whole["step"]
    assert part["tokens"] % 16 > fixed["tokens"] % 16 == 0  # rounded up to the shape of a fixed step
    assert {**more, "free": whole["free"]} == whole
    refuses(
        "discover {shelf}/gpt2 --data {shelf}/pairs.jsonl --dry-run --step graph --device cpu", "needs a CUDA device"
    )


def of_many_lengths(rows):
    """The pairs, two of each length."""
    for number, row in enumerate(rows):
        yield {side: text.replace(" .", " barking" * (number // 2) + " .") for side, text in row.items()}


def test_micro_batches_find_the_same_circuit(shelf, run):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--dtype", "float64", "--out"]
    assert run(*arguments, "whole")[0] == run(*arguments, "parts", "--micro-batch", "1", "--step", "fixed")[0] == 0
    whole, parts = (load_file(f"{name}/masks.safetensors")["edge"] for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)  # the multipliers are float32

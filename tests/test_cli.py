"""The command line: what each command prints and writes, and one clear line for everything that can go wrong.

Commands run in this process through ``main()``; the interrupted run is a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedTokenizerFast

from fastcircuit import cli, demo
from fastcircuit.circuit import Circuit
from fastcircuit.discovery import Settings
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph
from tests.models.tiny import tiny_model

NAMES = {"She": ["Anna", "Mary", "Lucy", "Emma"], "He": ["Tom", "Ben", "Max", "Sam"]}
WORDS = ["?", ".", "saw", "the", "dog", "cat", "barking", "She", "He", *NAMES["She"], *NAMES["He"]]
QUICK = ["--steps", "12", "--batch-size", "4", "--edges", "40"]


def pairs():
    for animal in ("dog", "cat"):
        for she, he in zip(*NAMES.values(), strict=True):
            yield {"clean": f"{she} saw the {animal} .<predict> She</predict>", "corrupted": f"{he} saw the {animal} ."}
            yield {"clean": f"{he} saw the {animal} .<predict> He</predict>", "corrupted": f"{she} saw the {animal} ."}


def save_tiny(path, name, words=WORDS):
    """A tiny random model and a tokenizer of whole words as a Hugging Face directory."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", model_max_length=16).save_pretrained(path)
    tiny_model(name, torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Models, data and one finished run, not to be changed: gpt2/, llama/, pairs.jsonl, run/."""
    root = tmp_path_factory.mktemp("shelf")
    for name in ("gpt2", "llama"):
        save_tiny(root / name, name)
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
    return root


@pytest.fixture(scope="module")
def finished(shelf):
    """A finished run of the tiny GPT-2."""
    call("discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", shelf / "run", "--json")
    return shelf / "run"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty directory, and none asks the network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def call(*arguments):
    """Exit code of ``fastcircuit arguments``."""
    before, sys.argv = sys.argv, ["fastcircuit", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    return stopped.value.code


@pytest.fixture
def run(capsys):
    """``run(*arguments)``: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = call(*arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(run):
    """``answer(*arguments)``: the one JSON object of a command that succeeds."""

    def answer(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return answer


def test_without_arguments_there_is_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(command in out for command in ("info", "discover", "evaluate", "compare", "draw", "demo"))


def test_info(run, answer):
    found = answer("info")
    assert set(found) == {"versions", "devices", "backends", "architectures", "models", "tasks"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"] is None
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert all(name in out for name in (*found["models"], *found["tasks"]))


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
    assert "logit difference" in out
    assert "wrote run/circuit.json, run/masks.safetensors" in out


def test_discover_within_a_budget_says_how_many_edges_that_takes(answer):
    program = ("tracr-xproportion", "--task", "tracr-xproportion", "--preset", "tracr", "--steps", "40")
    found = answer("discover", *program, "--kl-budget", "0.01", "--out", "budget")["discover"]
    assert found["edges"] == 7
    assert found["test"]["kl"] < 1e-6
    assert json.loads(Path("budget/circuit.json").read_text())["provenance"]["kl_budget"] == 0.01


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
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
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


def test_compare_writes_intersection_and_union(run, answer):
    graph = Graph(2, 2, 1, "split")
    a, b = (Circuit.from_edges(graph, graph.edges[part]) for part in (slice(0, 6), slice(4, 9)))
    a.save("a.json")
    b.save("b.json")
    found = answer("compare", "a.json", "b.json", "--intersection", "both.json", "--union", "either.json")
    assert (found["first"], found["second"], found["intersection"], found["union"]) == (6, 5, 2, 9)
    assert Circuit.load("both.json") == a & b
    assert Circuit.load("either.json") == a | b
    code, out, err = run("compare", "a.json", "b.json")
    assert (code, err) == (0, "")
    assert "expected by chance" in out


@pytest.mark.parametrize(
    ("name", "start"), [("c.svg", b"<svg"), ("c.png", b"\x89PNG"), ("new/c.html", b"<!doctype html>")]
)
def test_draw(finished, answer, name, start):
    assert answer("draw", finished / "circuit.json", "-o", name) == {"edges": 40, "files": [name]}
    assert start in Path(name).read_bytes()[:200]


@pytest.mark.slow
def test_demo(answer):
    story = answer("demo")
    assert set(story) == {"discover", "extract", "files"}
    assert set(story["discover"]) == {"edges", "total_edges", "sparsity", "test", "seconds"}
    assert set(story["discover"]["test"]) == {"kl", "accuracy", "logit_difference", "exact_match"}
    assert story["discover"]["edges"] == demo.EDGES
    assert story["discover"]["test"]["kl"] <= demo.WORST_KL
    assert story["discover"]["test"]["accuracy"] >= demo.LEAST_ACCURACY
    assert all(Path(file).stat().st_size for file in story["files"])


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
    Path("uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *pairs()]))
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


def test_a_demo_worse_than_stated_fails(run, monkeypatch):
    monkeypatch.setattr(demo, "SETTINGS", Settings(steps=2, refine=False))
    code, out, err = run("demo", "--out", "shown", "--json")
    assert code == 1
    assert json.loads(out)["files"] == [f"shown/{name}" for name in sorted(os.listdir("shown"), key=_as_written)]
    assert err.splitlines()[-1].startswith("error: the demo's circuit has test KL ")


def _as_written(name):
    return ["circuit.json", "masks.safetensors", *demo.PICTURES, demo.SUBMODEL].index(name)


BAD_CALLS = {
    # what: arguments, with {shelf} and {run}; exit code 2; what the line says
    "option": ("info --frobnicate", "No such option: --frobnicate"),
    "command": ("frobnicate", "No such command 'frobnicate'"),
    "choice": ("discover {shelf}/gpt2 --device tpu", "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
    "no model": ("discover", "Missing argument"),
    "unknown model": ("discover no-such-model --task pronoun", "cannot load model 'no-such-model'"),
    "path to no model": ("discover ./nothing --task pronoun", "no such model directory: ./nothing"),
    "weights to no model": ("discover a.safetensors --task pronoun", "no such model directory: a.safetensors"),
    "file as model": ("discover {shelf}/pairs.jsonl --task pronoun", "is a file; name the directory"),
    "directory as model": ("discover {shelf} --task pronoun", "is no model directory: there is no config.json in it"),
    "task": ("discover {shelf}/gpt2 --task nothing", "no task 'nothing'; tasks: induction, pronoun"),
    "task that does not fit": ("discover {shelf}/gpt2 --task induction", "one token per letter"),
    "task and data": ("discover {shelf}/gpt2 --task pronoun --data {shelf}/pairs.jsonl", "--task NAME"),
    "no task": (
        "discover {shelf}/gpt2",
        "--task NAME (induction, pronoun, pronoun-212, tracr-reverse, tracr-xproportion) or --data PAIRS.jsonl",
    ),
    "no data": ("discover {shelf}/gpt2 --data nothing.jsonl", "data file nothing.jsonl does not exist"),
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
    "resume, overwrite": ("discover {shelf}/gpt2 --task pronoun --resume --overwrite", "contradict each other"),
    "circuit": ("evaluate {shelf}/gpt2 nothing.json --task pronoun", "circuit file nothing.json does not exist"),
    "no circuit": ("evaluate {shelf}/gpt2 {shelf}/pairs.jsonl --task pronoun", "pairs.jsonl is not valid JSON (line 2"),
    "another model's circuit": ("evaluate {shelf}/llama {run}/circuit.json --data {shelf}/pairs.jsonl", "the circuit "),
    "split": ("evaluate {shelf}/gpt2 {run}/circuit.json --data {shelf}/pairs.jsonl --split dev", "has no split 'dev'"),
    "circuit of own data": ("evaluate {shelf}/gpt2 {run}/circuit.json", "no task 'pairs'; tasks: induction"),
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
    "other graph": ("compare {run}/circuit.json {shelf}/other.json --union u.json", "over different graphs"),
    "suffix": ("draw {run}/circuit.json -o c.jpg", "its suffix is not one of .svg, .png, .html"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(shelf, finished, run, case):
    arguments, message = BAD_CALLS[case]
    if case == "other graph":
        Circuit.full(Graph(2, 2, 1, "split")).save(shelf / "other.json")
    assert_refused(run, arguments.format(shelf=shelf, run=finished).split(), message)


def assert_refused(run, arguments, message, code=2):
    before = sorted(Path().rglob("*"))
    found, out, err = run(*arguments)
    assert (found, out) == (code, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert sorted(Path().rglob("*")) == before


def row(clean, corrupted="Ben saw the dog ."):
    return json.dumps({"clean": clean, "corrupted": corrupted}) + "\n"


GOOD_ROW = row("Anna saw the dog .<predict> She</predict>")
BAD_ROWS = {
    "no JSON": ('{"clean": "An\n', "pairs.jsonl line 2: not valid JSON"),
    "a key missing": ('{"clean": "x"}\n', 'pairs.jsonl line 2: "corrupted" is missing'),
    "no span": (row("Anna saw"), 'pairs.jsonl line 2: "clean" has no <predict>...</predict> span'),
    "lengths": (row("Anna saw the .<predict> She</predict>"), "line 2: the clean prompt has 4 tokens"),
    "inside a token": (row("Anna saw the dog bark<predict>ing</predict>"), "line 2: the answer 'ing' cuts the token"),
    "too long": (row("dog " * 20 + "<predict>She</predict>", "cat " * 20), "the model reads 16"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(shelf, run, case):
    bad, message = BAD_ROWS[case]
    Path("pairs.jsonl").write_text(GOOD_ROW + bad + GOOD_ROW)
    assert_refused(run, ["discover", shelf / "gpt2", "--data", "pairs.jsonl"], message)


def test_a_tokenizer_of_another_model_is_named(shelf, run):
    words = [*WORDS[:7], *(f"w{i}" for i in range(41)), *WORDS[7:]]
    save_tiny(Path("model"), "gpt2", words)
    message = "is outside the vocabulary of 41 tokens; load the task with the model's own tokenizer"
    assert_refused(run, ["discover", "./model", "--data", shelf / "pairs.jsonl"], message)


def break_weights(name, change):
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(_):
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def poison(_):
    break_weights("transformer.h.1.mlp.c_fc.weight", lambda tensors, name: tensors[name][3].fill_(float("nan")))


def drop(_):
    break_weights("transformer.h.1.mlp.c_fc.weight", lambda tensors, name: tensors.pop(name))


def reshape(_):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "n_embd": 48}))


def unsupported(_):
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained("model")


def no_config(_):
    Path("model/config.json").write_text("{")


def no_tokenizer(_):
    Path("model/tokenizer.json").write_text("{}")


BROKEN_MODELS = {
    truncate: "cannot load model './model': ",
    poison: "weight transformer.h.1.mlp.c_fc.weight holds NaN or infinity",
    drop: "1 weight(s) are not in its file, such as transformer.h.1.mlp.c_fc.weight",
    reshape: "cannot load model './model': ",
    unsupported: "architecture 'bert' is not supported; supported: gpt2, llama, mistral, qwen2",
    no_config: "cannot load model './model': ",
    no_tokenizer: "cannot load the tokenizer of './model': ",
}


@pytest.mark.parametrize("damage", BROKEN_MODELS, ids=lambda damage: damage.__name__)
def test_a_broken_model_is_refused(shelf, run, damage):
    save_tiny(Path("model"), "gpt2")
    damage(Path("model"))
    assert_refused(run, ["discover", "./model", "--data", shelf / "pairs.jsonl"], BROKEN_MODELS[damage])


def test_a_damaged_checkpoint_is_refused(shelf, run):
    Path("run").mkdir()
    Path("run/checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", "run", "--resume"]
    assert_refused(run, arguments, "checkpoint run/checkpoint.safetensors is damaged")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(shelf, run):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--device", "cuda"]
    assert_refused(run, arguments, "device cuda is not available here")


@pytest.fixture
def full_disk(tmp_path):
    """A directory on a file system of 4 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_nothing_half_written(shelf, finished, run, full_disk):
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", full_disk / "run"]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert "No space left on device" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith(f"error: cannot write {full_disk}/run/checkpoint.safetensors: ")
    assert [path for path in full_disk.rglob("*") if path.is_file()] == []
    code, out, err = run("draw", finished / "circuit.json", "-o", full_disk / "c.html")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert list(full_disk.glob("*.html")) == []


def test_a_directory_that_may_not_be_written_is_refused_at_once(shelf, run):
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("the superuser may write anywhere")
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--out", "locked/run"]
    assert_refused(run, arguments, "cannot write into locked/run: Permission denied")


def test_ctrl_c_outside_a_step(shelf, run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load_model", stop)
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl"]
    assert_refused(run, arguments, "interrupted; nothing was left half-written", code=1)


def test_the_unexpected_is_one_line_too(shelf, run, monkeypatch):
    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli, "_load_model", fail)
    arguments = ["discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl"]
    message = "unexpected RuntimeError: first line second line (--debug shows where)"
    assert_refused(run, arguments, message, code=1)


def test_debug_shows_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastcircuit", "discover", "./nothing", "--task", "pronoun", "--debug"])
    with pytest.raises(InputError, match="no such model directory"):
        cli.main()

"""``fastcircuit bench``."""

import json
from pathlib import Path

import pytest

from fastcircuit.benchmarks import floors, rows
from tests.bench.toys import BELIEVING, row, toy


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


@pytest.fixture
def toys(monkeypatch):
    """``toys(case, ...)``: what every suite holds, measured in no time."""
    monkeypatch.setattr("fastcircuit.benchmarks.runner.clock", lambda device: BELIEVING)
    return lambda *cases: monkeypatch.setattr("fastcircuit.benchmarks.registry.load", lambda suite, target: cases)


def test_a_suite_prints_its_table_and_appends_rows(toys, run, answer):
    toys(toy())
    code, out, err = run("bench", "ops", "--quick", "--threads", "1")
    assert code == 0, err
    assert "fastcircuit" in out
    assert "toy/sleep" in err
    first = rows.read(Path("runs/bench"))
    assert [(found.variant, found.quick, found.threads) for found in first] == [
        ("fastcircuit", True, 1),
        ("slow", True, 1),
    ]
    found = answer("bench", "--results", "runs/bench")
    assert (found["suite"], found["problems"], found["curves"]) == ("all", [], [])
    assert set(found["seconds"]) == {"toy"}
    assert rows.read(Path("runs/bench"))[:2] == first
    assert [new["variant"] for new in found["rows"]] == ["fastcircuit", "slow"]
    assert len(rows.read(Path("runs/bench"))) == 4


def test_a_red_gate_fails_after_the_rest_is_kept(toys, run):
    toys(toy("bad", wrong="3 of 4 numbers are off"), toy("good"))
    code, out, err = run("bench", "step", "--json")
    assert code == 1
    assert err.splitlines()[-1] == "error: toy/bad/small/float32: fastcircuit: 3 of 4 numbers are off"
    assert {new["name"] for new in json.loads(out)["rows"]} == {"good"}
    assert {kept.name for kept in rows.read(Path("runs/bench"))} == {"good"}


def test_a_curve_that_is_too_steep_fails(toys, run):
    points = {"1": 0.001, "2": 0.008, "4": 0.064}
    case = toy(baseline=None, axis="tokens", exponents=(0.6, 1.4))
    variants = {x: lambda _, s=s: toy(fast=s).variants["fastcircuit"](None) for x, s in points.items()}
    toys(type(case)(**{**vars(case), "variants": variants}))
    code, out, err = run("bench", "scaling", "--quick", "--json")
    assert code == 1
    (curve,) = json.loads(out)["curves"]
    assert (curve["what"], curve["accepted"]) == ("p50_ms", [0.6, 1.4])
    assert curve["exponent"] == pytest.approx(3.0)
    assert "p50_ms grows with tokens to the " in err
    assert "accepted: 0.6 to 1.4" in err


def test_rows_of_no_commit_are_refused(toys, refuses, monkeypatch):
    toys(toy())
    monkeypatch.setattr("fastcircuit.benchmarks.environment.ROOT", Path.cwd())
    monkeypatch.setattr("fastcircuit.benchmarks.environment.changed", lambda: ["a.py", "b.py"])
    refuses("bench ops --results kept", "rows in kept are of a commit, and a.py and 1 more differs from it; commit")


@pytest.mark.parametrize(("last", "code"), [(0.003, 0), (0.0099, 1), (0.012, 1)])
def test_a_step_that_is_no_faster_when_sparse_fails(toys, run, last, code):
    times = {"0": 0.01, "0.5": 0.02, "0.9": last}
    case = toy(baseline=None, axis="sparsity", falls=True)
    variants = {x: lambda _, s=s: toy(fast=s).variants["fastcircuit"](None) for x, s in times.items()}
    toys(type(case)(**{**vars(case), "variants": variants}))
    found, _, err = run("bench", "scaling", "--quick", "--json")
    assert found == code, err
    assert ("p50_ms does not fall with sparsity: 10 at 0, " in err) == bool(code)


def test_compare_files(run, answer):
    rows.append(Path("old"), [row()])
    rows.append(Path("new"), [row(p20_ms=4.5, p50_ms=5.0, p80_ms=5.5)])
    (change,) = answer("bench", "compare", "old", "new")["changes"]
    assert (change["speedup"], change["verdict"]) == (2.0, "faster")
    code, out, _ = run("bench", "compare", "old", "new")
    assert code == 0
    assert "faster" in out


def test_check_and_its_floors(toys, run, answer, monkeypatch):
    monkeypatch.setattr(floors, "FILE", Path("floors.json").absolute())
    monkeypatch.setattr(floors, "SUITES", ("ops",))
    monkeypatch.setattr(floors, "load", lambda suite, target: [toy()])
    code, _, err = run("bench", "check")
    assert code == 2
    assert "there are no floors for" in err
    (written,) = answer("bench", "check", "--update")["ratios"]
    assert written["floor"] == pytest.approx(written["ratio"], abs=1e-3)
    assert answer("bench", "check")["problems"] == []
    stored = json.loads(floors.FILE.read_text())
    stored["floors"] = {here: dict.fromkeys(names, 100.0) for here, names in stored["floors"].items()}
    floors.FILE.write_text(json.dumps(stored))
    code, _, err = run("bench", "check", "--json")
    assert code == 1
    assert "its floor is 100" in err


def test_check_says_what_a_drop_is_and_where_there_are_floors(run):
    _, out, _ = run("bench", "check", "--help")
    assert "its interval's upper end too" in " ".join(out.split())
    machines = json.loads(floors.FILE.read_text())["floors"]
    assert all(f'"{machine}"' in " ".join(out.split()) for machine in machines)


def test_plot(run, answer):
    rows.append(Path("results"), [row(suite="inference", bound=5.0), row(suite="inference", variant="sdpa")])
    found = answer("bench", "plot", "--results", "results", "--out", "pictures")
    assert sorted(path.name for path in Path("pictures").iterdir()) == sorted(Path(f).name for f in found["files"])
    assert found["missing"] == {"roofline": "ops", "memory": "scaling", "sparsity": "scaling"}


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "suite": ("bench nothing", "No such command 'nothing'"),
    "options before the suite": ("bench --quick ops", "options come behind the suite: fastcircuit bench ops --..."),
    "threads": ("bench ops --threads 0", "Invalid value for '--threads'"),
    "results in a file": ("bench ops --quick --results {shelf}/pairs.jsonl", "cannot write into"),
    "device": ("bench ops --device tpu", "Invalid value for '--device'"),
    "nothing to compare": ("bench compare nothing nothing", "nothing is neither a results file nor a commit"),
    "suite of commits": ("bench compare HEAD HEAD --suite x", "no suite 'x'; suites: ops,"),
    "nothing to plot": ("bench plot --results nowhere", "results file nowhere does not exist"),
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

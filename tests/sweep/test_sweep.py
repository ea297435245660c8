"""Sweeps: which runs a plan has, that a stopped one goes on, tables and plots."""

import csv
import json
from pathlib import Path

import pytest

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.sweep.plan import METHODS, Plan
from fastcircuit.sweep.plots import extraction_panels
from fastcircuit.sweep.runner import Sweep
from fastcircuit.sweep.tables import circuit_rows, summary
from tests.discovery.test_edge_pruning import QUICK, make_task
from tests.models.tiny import tiny_model

PLAN = Plan(
    model="tiny",
    task="pairs",
    methods=("eap-ig", "edge-pruning", "acdc"),
    sparsities=(0.8, 0.9),
    thresholds=(0.01,),
    seeds=(0, 1),
    settings=QUICK,
)


@pytest.fixture(scope="module")
def model():
    return MaskedCausalLM(tiny_model("gpt2"))


def sweep(model, directory, plan=PLAN):
    return Sweep(plan, directory, model, lambda seed: make_task(seed=seed))


def test_a_plan_names_its_runs():
    graph = Graph(2, 2, 1, "split")
    jobs = list(Plan("m", "t", sparsities=(0.25, 0.251), thresholds=(0.1, 1.0)).jobs(graph))
    assert len({job.name for job in jobs}) == len(jobs)
    by_method = {method: [job for job in jobs if job.method == method] for method in METHODS}
    assert len(by_method["eap"]) == 3  # both sparsities are one number of edges
    assert len(by_method["acdc"]) == 6
    assert len(by_method["extract"]) == 3
    assert {job.size for job in by_method["edge-pruning"]} == {35}  # of 47


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("acdc", "adcd")}, "no method 'adcd'; methods of a sweep are edge-pruning, eap, "),
        ({"methods": ()}, "a sweep needs methods"),
        ({"seeds": (1, 1)}, "seeds names one twice"),
        ({"seeds": (0, -1)}, "seed is -1; it must be 0 or more"),
        ({"sparsities": (95.0,)}, "sparsity is 95.0"),
        ({"thresholds": (float("nan"),)}, "threshold is nan"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Plan("m", "t", **changes)


def test_a_stopped_sweep_goes_on(model, tmp_path):
    whole = sweep(model, tmp_path / "whole")
    done = []
    whole.run(lambda job, *_: done.append(job.name))
    assert done == [job.name for job in whole.jobs]
    rows = circuit_rows(whole)
    assert [row["edges"] for row in rows if row["method"] != "acdc"] == 2 * 2 * sorted(
        {row["edges"] for row in rows if row["method"] != "acdc"}, reverse=True
    )

    class Stopped(Exception):
        pass

    def stop(job, number, most):
        if number == 5:
            raise Stopped

    with pytest.raises(Stopped):
        sweep(model, tmp_path / "stopped").run(stop)
    again = sweep(model, tmp_path / "stopped")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / "runs").iterdir()}
    assert len(kept) == 5
    done.clear()
    again.run(lambda job, *_: done.append(job.name))
    assert len(done) == len(again.jobs) - 5
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert circuit_rows(again) == rows


def test_a_directory_holds_one_model_and_task(model, tmp_path):
    plan = Plan("tiny", "pairs", methods=("random",), seeds=(0,))
    sweep(model, tmp_path, plan).run()
    sweep(model, tmp_path, Plan("tiny", "pairs", methods=("random", "eap"), seeds=(0, 1)))  # may grow
    with pytest.raises(InputError, match="holds a sweep with task 'pairs', not 'ioi'; choose another --out"):
        sweep(model, tmp_path, Plan("tiny", "ioi", methods=("random",)))
    circuit = Circuit.load(next((tmp_path / "runs").iterdir()))
    assert circuit.provenance["method"] == "random"
    assert set(circuit.metrics["test"]) >= {"kl", "accuracy"}


@pytest.mark.parametrize(("options", "ablation"), [([], "zero"), (["--ablation", "mean"], "mean")])
def test_an_ablation_that_is_not_given_is_the_presets(answer, options, ablation):
    program = ["tracr-xproportion", "--task", "tracr-xproportion", "--preset", "tracr", "--steps", "3", *options]
    methods = ["--methods", "edge-pruning,eap-ig,acdc", "--sparsities", "0.9", "--thresholds", "0.1", "--seeds", "0"]
    answer("sweep", *program, *methods, "--out", "s")
    circuits = [Circuit.load(path) for path in Path("s/runs").iterdir()]
    assert [circuit.ablation for circuit in circuits] == 3 * [ablation]
    answer("discover", *program, "--edges", "7", "--out", "d")
    assert Circuit.load("d/circuit.json").ablation == ablation


def test_a_sweep_goes_on_with_the_same_dtype_and_embedding_nodes_alone(shelf, answer, run):
    arguments = ["sweep", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--methods", "random", "--seeds", "0"]
    answer(*arguments, "--sparsities", "0.9", "--out", "s")
    for option, other, message in (
        ("--dtype", "float64", "holds a sweep with dtype 'float32', not 'float64'; choose another --out"),
        ("--embedding-nodes", "joint", "holds a sweep with embedding_nodes 'split', not 'joint'"),
    ):
        code, _, err = run(*arguments, "--sparsities", "0.8,0.9", "--out", "s", option, other)
        assert code == 2
        assert message in err
        assert len(list(Path("s/runs").iterdir())) == 1


def test_summaries_are_means_over_seeds():
    rows = [
        {"method": "eap", "seed": seed, "threshold": None, "edges": 5, "sparsity": 0.9, "kl": kl, "accuracy": None}
        for seed, kl in enumerate((1.0, 2.0, 6.0))
    ]
    (line,) = summary(rows)
    assert (line["seeds"], line["edges"], line["kl"]) == (3, 5, 3)
    assert line["kl_deviation"] == pytest.approx(7**0.5)
    assert "accuracy" not in line


def test_extraction_panels_average_over_seeds():
    rows = [
        {"ablation": "mean", "mlps": True, "seed": seed, "threshold": alpha, "size": size + seed / 10, "accuracy": 0.5}
        | {"model_accuracy": 1.0}
        for seed in (0, 1)
        for alpha, size in ((0.1, 0.6), (1.0, 0.2))
    ]
    by_size, by_alpha = extraction_panels(rows)
    assert by_size.lines[0].x.tolist() == pytest.approx([25, 65])
    assert by_alpha.lines[0].y.tolist() == pytest.approx([65, 25])
    assert by_size.level == ("full model", 1)


def test_the_command_writes_tables_and_plots(shelf, finished, answer, run):
    arguments = ["sweep", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--methods", "eap-ig,extract,acdc"]
    sizes = ["--sparsities", "0.9", "--thresholds", "0.01,0.3", "--seeds", "0,1"]
    found = answer(*arguments, *sizes, "--truth", finished / "circuit.json", "--out", "s")
    names = {"circuits.csv", "summary.csv", "extraction.csv", "sweep.json"}
    names |= {f"{plot}.{kind}" for plot in ("circuits", "extraction", "roc") for kind in ("svg", "png")}
    assert {Path(path).name for path in found["files"]} == names
    assert all(Path(path).stat().st_size for path in found["files"])
    rows = list(csv.DictReader(Path("s/circuits.csv").read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("eap-ig", seed) for seed in "01"),
        *(("acdc", seed) for seed in "0011"),
    ]
    assert all(0 <= float(row["edges_tpr"]) <= 1 for row in rows)
    extracted = list(csv.DictReader(Path("s/extraction.csv").read_text().splitlines()))
    assert len(extracted) == 2 * 4 * 30
    assert json.loads(Path("s/sweep.json").read_text())["summary"] == found["sweep"]
    svg = Path("s/circuits.svg").read_text()
    code, out, _ = run(*arguments, *sizes, "--truth", finished / "circuit.json", "--out", "s")
    assert code == 0
    assert "eap-ig" in out
    assert Path("s/circuits.svg").read_text() == svg


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--methods eap,magic", "no method 'magic'; methods of a sweep are"),
        ("--sparsities a,b", "--sparsities 'a,b' is no list of numbers"),
        ("--seeds ,", "a sweep needs seeds"),
        ("--truth nothing.json --methods random", "no manual circuit and no file 'nothing.json'"),
        ("--split dev --methods random", "has no split 'dev'"),
        ("--ablation noise", "ablation is 'noise'; accepted: interchange, mean, zero"),
    ],
)
def test_bad_input_is_one_line(refuses, command, message):
    refuses(f"sweep {{shelf}}/gpt2 --data {{shelf}}/pairs.jsonl --out s {command}", message)


def test_workers_find_what_one_process_does(shelf, answer):
    arguments = ["sweep", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--methods", "eap-ig,random,acdc"]
    sizes = ["--sparsities", "0.8,0.9", "--thresholds", "0.3", "--seeds", "0,1"]
    alone, spread = (
        answer(*arguments, *sizes, *more, "--out", out)["sweep"] for more, out in (([], "a"), (["--workers", "2"], "b"))
    )
    assert alone == spread
    assert answer(*arguments, *sizes, "--workers", "2", "--out", "b")["sweep"] == spread  # nothing is left to run

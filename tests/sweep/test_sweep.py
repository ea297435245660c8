"""Sweeps: which runs a plan has, that a stopped one goes on, tables and plots."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import discover, preset
from fastcircuit.discovery.presets import edge_target
from fastcircuit.errors import InputError
from fastcircuit.evaluation.reference import Reference
from fastcircuit.graph import Graph
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.sweep import pool
from fastcircuit.sweep.plan import METHODS, Plan
from fastcircuit.sweep.plots import extraction_panels
from fastcircuit.sweep.recovery import curve_through
from fastcircuit.sweep.runner import Sweep
from fastcircuit.sweep.tables import circuit_rows, extraction_summary, summary
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


def timeless(row):
    """A row without what differs from run to run."""
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


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


@pytest.mark.parametrize("name", ["ioi", "ioi-t1", "greater-than", "gendered-pronoun"])
def test_a_published_preset_aims_every_size_at_a_target_of_its_own(name):
    sizes = (0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995)
    graph = Graph(12, 12, 12, "split")
    plan = Plan("gpt2", name, ("edge-pruning",), sizes, seeds=(0,), settings=preset(name), preset=name)
    targets = [plan.settings_of(job, graph).edge_target for job in plan.jobs(graph)]
    assert all(low < high for low, high in itertools.pairwise(targets))
    assert 0.9 < targets[0] < 0.95
    assert 1 < targets[-1] <= 1.4
    assert all(
        plan.settings_of(job, graph).silent_node_target == preset(name).silent_node_target for job in plan.jobs(graph)
    )
    assert plan.fixed()["preset"] == name  # circuits found with other targets are not taken for these


def test_targets_are_those_that_reruns_of_the_published_code_ended_near():
    assert edge_target("ioi", 0.966) == 0.97
    assert edge_target("ioi", 0.983) == 1.1
    assert edge_target("greater-than", 0.9865) == pytest.approx(0.985)
    assert edge_target("gendered-pronoun", 0.995) == 1.1
    assert edge_target("ioi", 0.476) == 0.47
    assert edge_target("boolean-expressions", 0.99) is None


def test_a_sweep_trains_with_the_target_of_each_size(model, tmp_path, monkeypatch):
    trained = []

    def train(*_, edges, settings, on_note):
        trained.append((edges, settings.edge_target, settings.steps))
        return discover(*_, edges=edges, settings=settings, on_note=on_note)

    monkeypatch.setattr("fastcircuit.sweep.runner.discover", train)
    settings = preset("ioi").changed({"steps": 3, "batch_size": 4})
    plan = Plan("m", "pairs", ("edge-pruning",), (0.8, 0.9), seeds=(0,), settings=settings, preset="ioi")
    sweep(model, tmp_path, plan).run()
    total = model.graph.num_edges
    assert trained == [
        (edges, edge_target("ioi", 1 - edges / total), 3) for edges in (round(0.2 * total), round(0.1 * total))
    ]
    assert trained[0][1] < trained[1][1]


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
    assert [timeless(row) for row in circuit_rows(again)] == [timeless(row) for row in rows]
    assert all(row["seconds"] > 0 for row in rows)
    eap = [row["seconds"] for row in rows if (row["method"], row["seed"]) == ("eap-ig", 0)]
    assert len(set(eap)) == 1  # all sizes are cut from one set of scores


@pytest.mark.parametrize("method", ["eap-ig", "edge-pruning", "acdc"])
def test_running_out_of_memory_is_said_and_kept(model, tmp_path, monkeypatch, method):
    whole, notes = Reference._compute, []

    def compute(self, examples):
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, examples)

    plan = dataclasses.replace(PLAN, methods=(method,), sparsities=(0.8,), seeds=(0,))
    monkeypatch.setattr(Reference, "_compute", compute)
    halved = sweep(model, tmp_path, plan)
    halved.on_note = notes.append
    halved.run()
    (job,) = halved.jobs
    assert notes
    assert all(line.startswith(f"{job.name}: out of memory in the full model: going on with about ") for line in notes)
    (row,) = circuit_rows(halved)
    assert row["notes"] == "; ".join(line.removeprefix(f"{job.name}: ") for line in notes)
    monkeypatch.setattr(Reference, "_compute", whole)
    unhurt = sweep(model, tmp_path / "unhurt", plan)
    unhurt.run()
    assert "notes" not in circuit_rows(unhurt)[0]


def test_a_worker_hands_its_notes_back(model, tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, methods=("random",), sparsities=(0.8, 0.9), seeds=(0,))
    worker = sweep(model, tmp_path, plan)

    def less(job, task):
        worker._note("less at a time")
        return Circuit(model.graph, np.ones(model.graph.num_edges, dtype=bool)), 1.0

    monkeypatch.setattr(worker, "_circuit", less)
    monkeypatch.setattr(pool, "_open_sweep", [worker])
    assert pool._run_group(worker.jobs) == [f"{job.name}: less at a time" for job in worker.jobs]


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
        | {"seconds": 2.0, "edges_auc": 0.5}
        for seed, kl in enumerate((1.0, 2.0, 6.0))
    ]
    (line,) = summary(rows)
    assert (line["seeds"], line["edges"], line["kl"]) == (3, 5, 3)
    assert line["kl_deviation"] == pytest.approx(7**0.5)
    assert "accuracy" not in line
    assert (line["seconds"], line["edges_auc"], line["edges_auc_deviation"]) == (2, 0.5, 0)


def test_extraction_has_a_summary_over_seeds():
    rows = [
        {"ablation": "mean", "mlps": mlps, "seed": seed, "threshold": alpha, "size": size, "seconds": 1.0, "auc": None}
        for mlps in (True, False)
        for seed, size in enumerate((0.2, 0.4, 0.9))
        for alpha in (0.1, 1.0)
    ]
    short = extraction_summary(rows)
    assert [(row["mlps"], row["threshold"], row["seeds"]) for row in short] == [
        (mlps, alpha, 3) for mlps in (True, False) for alpha in (0.1, 1.0)
    ]
    assert short[0]["size"] == pytest.approx(0.5)
    assert short[0]["size_deviation"] == pytest.approx(0.13**0.5)
    assert "auc" not in short[0]


def test_a_curve_leads_from_nothing_through_what_was_found_to_everything():
    curve = curve_through([{"fpr": 0.5, "tpr": 1.0}, {"fpr": 0.0, "tpr": 0.5}])
    assert (curve.fpr, curve.tpr) == ((0, 0, 0.5, 1), (0, 0.5, 1, 1))
    assert curve.auc == pytest.approx(0.375 + 0.5)
    assert curve_through([{"fpr": None, "tpr": 1.0}]) is None
    assert curve_through([]) is None


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
    names = {"circuits.csv", "summary.csv", "extraction.csv", "extraction_summary.csv", "sweep.json"}
    plots = ("circuits", "extraction", "roc", "extraction_roc")
    names |= {f"{plot}.{kind}" for plot in plots for kind in ("svg", "png")}
    assert {Path(path).name for path in found["files"]} == names
    assert all(Path(path).stat().st_size for path in found["files"])
    rows = list(csv.DictReader(Path("s/circuits.csv").read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("eap-ig", seed) for seed in "01"),
        *(("acdc", seed) for seed in "0011"),
    ]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("edges_tpr", "edges_auc", "nodes_auc"))
    assert all(float(row["seconds"]) > 0 for row in rows)
    extracted = list(csv.DictReader(Path("s/extraction.csv").read_text().splitlines()))
    assert len(extracted) == 2 * 4 * 30
    assert len(Path("s/extraction_summary.csv").read_text().splitlines()) == 1 + 4 * 30
    assert json.loads(Path("s/sweep.json").read_text())["summary"] == found["sweep"]
    svg = Path("s/circuits.svg").read_text()
    code, out, _ = run(*arguments, *sizes, "--truth", finished / "circuit.json", "--out", "s")
    assert code == 0
    assert "eap-ig" in out
    assert Path("s/circuits.svg").read_text() == svg


def test_extraction_alone_has_roc_curves(shelf, finished, answer):
    arguments = ["sweep", shelf / "gpt2", "--data", shelf / "pairs.jsonl", "--methods", "extract", "--seeds", "0"]
    found = answer(*arguments, "--truth", finished / "circuit.json", "--out", "s")
    assert {Path(path).name for path in found["files"] if path.endswith(".svg")} == {
        "extraction.svg",
        "extraction_roc.svg",
    }
    rows = list(csv.DictReader(Path("s/extraction.csv").read_text().splitlines()))
    curves = {}
    for row in rows:
        curves.setdefault((row["ablation"], row["mlps"]), []).append(row)
    assert len(curves) == 4
    for (ablation, _), curve in curves.items():
        (auc,) = {row["auc"] for row in curve}
        points = sorted([(0.0, 0.0), *((float(row["fpr"]), float(row["tpr"])) for row in curve), (1.0, 1.0)])
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        assert float(auc) == pytest.approx(area, abs=1e-5)
        assert f"{ablation} ablation" in Path("s/extraction_roc.svg").read_text()


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
    assert [timeless(row) for row in alone] == [timeless(row) for row in spread]
    assert answer(*arguments, *sizes, "--workers", "2", "--out", "b")["sweep"] == spread  # nothing is left to run

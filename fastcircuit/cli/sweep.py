"""``fastcircuit sweep``."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import (
    AsJson,
    DataFile,
    Device,
    Dtype,
    EmbeddingNodes,
    InDtype,
    Model,
    Nodes,
    OnDevice,
    TaskName,
)
from fastcircuit.cli.sources import check_source, load_model, load_task
from fastcircuit.errors import InputError

if TYPE_CHECKING:
    from fastcircuit.report.progress import Watcher
    from fastcircuit.sweep.plan import Job, Plan
    from fastcircuit.sweep.runner import OnRun, Sweep

Value = TypeVar("Value")


def sweep(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the sweep; what is finished in it is not run again.")],
    task: TaskName = None,
    data: DataFile = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, separated by commas: those of discover, and extract. Default: all."),
    ] = None,
    sparsities: Annotated[
        str, typer.Option(help="Fractions of edges to remove, separated by commas.")
    ] = "0.8,0.9,0.95,0.97,0.98",
    thresholds: Annotated[
        str, typer.Option(help="Of acdc, which takes no size: KL rises in nats, separated by commas.")
    ] = "0.001,0.003,0.01,0.03,0.1",
    seeds: Annotated[str, typer.Option(help="Separated by commas; each draws its own pairs and splits.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Optimisation steps of edge-pruning.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step of edge-pruning.")] = None,
    preset: Annotated[str | None, typer.Option(help="Published hyperparameters of edge-pruning, e.g. ioi.")] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            help="What a removed edge carries: interchange, mean or zero. Default: the preset's, or interchange."
        ),
    ] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Pairs to find circuits on. Default: the task's.", show_default=False)
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Pairs of the test split. Default: the task's.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "test",
    truth: Annotated[
        str | None,
        typer.Option(help="Known circuit: a file, or a manual circuit by name. Adds rates and ROC curves."),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Runs at a time, each in a process with its share of the threads.", min=1)
    ] = 1,
    embedding_nodes: Nodes = EmbeddingNodes.split,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Compare methods on a task: every method at every size with every seed; writes tables and plots."""
    from fastcircuit.discovery import Settings
    from fastcircuit.discovery import preset as preset_settings
    from fastcircuit.evaluation.truth import Truth
    from fastcircuit.files import check_writable
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import sweep_table
    from fastcircuit.sweep.plan import METHODS, Plan
    from fastcircuit.sweep.plots import write_plots
    from fastcircuit.sweep.pool import run_in_workers
    from fastcircuit.sweep.runner import check_plan
    from fastcircuit.sweep.tables import circuit_rows, summary, write_tables

    check_source(task, data)
    given = {"steps": steps, "batch_size": batch_size, "ablation": ablation}
    changes = {name: value for name, value in given.items() if value is not None}
    plan = Plan(
        model=model,
        task=task or str(data),
        methods=METHODS if methods is None else tuple(_listed(methods, str, "methods")),
        sparsities=tuple(_listed(sparsities, float, "sparsities")),
        thresholds=tuple(_listed(thresholds, float, "thresholds")),
        seeds=tuple(_listed(seeds, int, "seeds")),
        settings=(preset_settings(preset) if preset else Settings()).changed(changes),
        preset=preset,
        split=split,
        train_size=train_size,
        test_size=test_size,
        dtype=dtype.value,
        embedding_nodes=embedding_nodes.value,
    )
    check_plan(plan, out)
    check_writable(out)
    open_sweep = functools.partial(_open, plan, out, device, dtype, embedding_nodes, task, data)
    running = open_sweep()
    known = None if truth is None else Truth.load(truth, running.model.graph)
    with watch(stderr) as watcher:
        running.on_note = watcher.on_note
        on_run = _reporter(running, watcher)
        if workers > 1:
            run_in_workers(running, open_sweep, workers, on_run)
        else:
            running.run(on_run)
    files = [*write_tables(running, out, known), *write_plots(running, out, known)]
    rows = summary(circuit_rows(running, known))
    if as_json:
        print_json({"sweep": rows, "files": [str(path) for path in files]})
    else:
        if rows:
            stdout.print(sweep_table(rows, plan.task, plan.split))
        stdout.print("wrote " + ", ".join(str(path) for path in files), soft_wrap=True)


def _open(
    plan: "Plan", out: Path, device: Device, dtype: Dtype, nodes: EmbeddingNodes, task: str | None, data: Path | None
) -> "Sweep":
    """The sweep in ``out``, with the model loaded; in workers too."""
    from fastcircuit.sweep.runner import Sweep

    masked = load_model(plan.model, device, dtype, nodes)
    return Sweep(plan, out, masked, lambda seed: load_task(plan.model, masked, task, data, seed, plan.sizes))


def _reporter(running: "Sweep", watcher: "Watcher") -> "OnRun":
    """Tells ``watcher`` of every run, with the time left by what runs of a kind cost."""
    started, left, spent = time.perf_counter(), sum(job.cost for job in running.missing), 0.0

    def on_run(job: "Job", done: int, most: int) -> None:
        nonlocal left, spent
        left, spent = left - job.cost, spent + job.cost
        watcher.on_run(job.name, done, most, (time.perf_counter() - started) / spent * left)

    return on_run


def _listed(text: str, kind: Callable[[str], Value], option: str) -> list[Value]:
    """The values of an option that are separated by commas."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{option} {text!r} is no list of numbers separated by commas, such as 1,2,3") from None

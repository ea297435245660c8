"""``fastcircuit discover``."""

import time
from pathlib import Path
from typing import Annotated, Any

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
    Seed,
    TaskName,
)
from fastcircuit.cli.sources import check_source, load_model, load_task
from fastcircuit.errors import InputError


def discover(
    model: Model,
    task: TaskName = None,
    data: DataFile = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to find the circuit: edge-pruning, acdc, eap, eap-ig, eap-ig-activations, clean-corrupted, exact "
            "or random."
        ),
    ] = "edge-pruning",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of edges to remove, in [0, 1). Default 0.95.", show_default=False)
    ] = None,
    edges: Annotated[int | None, typer.Option(help="Number of edges to keep, instead of --sparsity.")] = None,
    kl_budget: Annotated[
        float | None, typer.Option(help="Keep the fewest edges found within this training KL, in nats, instead.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Attributions: number of writers to keep, with their edges.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="acdc: KL rise from which an edge stays; attributions: least score to keep.")
    ] = None,
    keep_dangling: Annotated[
        bool,
        typer.Option("--keep-dangling", help="Not edge-pruning: keep edges that lead nowhere or carry nothing, too."),
    ] = False,
    most_examples: Annotated[
        int | None,
        typer.Option(help="Not edge-pruning: pairs to work on, the first. Default: all.", show_default=False),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Attributions: kl, logit-difference or nll. Default: kl, and for eap the second.")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(help="Edge Pruning: start from the ranking of an attribution, e.g. eap-ig.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    both_directions: Annotated[
        bool,
        typer.Option(
            "--both-directions", help="Edge Pruning: learn from every pair the other way round too, corrupted as clean."
        ),
    ] = False,
    preset: Annotated[str | None, typer.Option(help="Published hyperparameters of an experiment, e.g. ioi.")] = None,
    upstream_compat: Annotated[
        bool,
        typer.Option(
            "--upstream-compat",
            help="Reproduce the published code's numerics, quirks included; needs a size or a preset.",
        ),
    ] = False,
    ablation: Annotated[
        str | None,
        typer.Option(
            help="What a removed edge carries: interchange, mean or zero. Default: the preset's, or interchange."
        ),
    ] = None,
    embedding_nodes: Nodes = EmbeddingNodes.split,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    out: Annotated[Path | None, typer.Option(help="Directory to write to. Default runs/MODEL-TASK.")] = None,
    step: Annotated[
        str, typer.Option(help="How steps are carried out: auto, dynamic, fixed, or graph (a CUDA graph).")
    ] = "auto",
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples at a time. Default: as many as fit.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory a run needs, and run nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to --out/tensorboard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the edges of MODEL that carry a task; writes circuit.json and masks.safetensors."""
    from fastcircuit.discovery.execution import Execution
    from fastcircuit.discovery.run import Run, settings_for
    from fastcircuit.files import check_writable
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import metrics_table

    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "warm_start": warm_start, "nodes": nodes}
    given |= {"threshold": threshold, "loss": loss, "ablation": ablation, "seed": seed}
    given |= {"most_examples": most_examples, "pruned": False if keep_dangling else None}
    given |= {"upstream_compat": upstream_compat or None, "both_directions": both_directions or None}
    settings = settings_for(method, preset, {name: value for name, value in given.items() if value is not None})
    if method != "edge-pruning":
        only = {"--dry-run": dry_run, "--tensorboard": tensorboard, "--step": step != "auto"}
        _refuse(method, {**only, "--micro-batch": micro_batch is not None})
    check_source(task, data)
    execution = Execution(step, micro_batch)
    if dry_run:
        _show_plan(model, task, data, settings, execution, seed, device, dtype, embedding_nodes, as_json)
        return
    where = out or Path("runs") / f"{Path(model).name}-{data.stem if data else task}"
    run = Run(where, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    check_writable(where)
    masked = load_model(model, device, dtype, embedding_nodes)
    pairs = load_task(model, masked, task, data, seed)
    started = time.perf_counter()
    with watch(stderr) as watcher:
        circuit = run.discover(
            masked,
            pairs,
            method,
            settings,
            sparsity,
            edges,
            kl_budget,
            watcher.on_report,
            watcher.on_round,
            watcher.on_progress,
            watcher.on_note,
            execution,
        )
    result = {
        "edges": circuit.num_edges,
        "total_edges": circuit.graph.num_edges,
        "sparsity": circuit.sparsity,
        **circuit.metrics,
        "seconds": time.perf_counter() - started,
    }
    files = [str(path) for path in run.files]
    if as_json:
        print_json({"discover": result, "files": files})
    else:
        stdout.print(metrics_table(circuit))
        stdout.print("wrote " + ", ".join(files), soft_wrap=True)


def _refuse(method: str, given: dict[str, bool]) -> None:
    """InputError when an option of Edge Pruning was given with another method."""
    for option in (option for option, was_given in given.items() if was_given):
        raise InputError(f"{option} is for edge-pruning, which takes steps; with method {method} leave it out")


def _show_plan(
    model: str,
    task: str | None,
    data: Path | None,
    settings: Any,
    execution: Any,
    seed: int,
    device: Device,
    dtype: Dtype,
    embedding_nodes: EmbeddingNodes,
    as_json: bool,
) -> None:
    """The plan of a run, from the model's configuration: no weights are read."""
    import torch

    from fastcircuit.discovery.discovery import training_pairs
    from fastcircuit.discovery.planner import plan
    from fastcircuit.models.loading import choose_device, shapes_of_model
    from fastcircuit.report.tables import plan_table

    place = torch.device(choose_device(device.value))
    masked = shapes_of_model(model, dtype.value, embedding_nodes.value)
    pairs = load_task(model, masked, task, data, seed)
    choices = None if pairs.answer_tokens is None else len(pairs.answer_tokens)
    found = plan(masked, training_pairs(pairs, settings), settings, place, choices, execution=execution).to_dict()
    if as_json:
        print_json({"plan": found})
    else:
        stdout.print(plan_table(found))

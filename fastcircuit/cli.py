"""The command line: arguments in, tables and files out. Progress goes to stderr, ``--json`` to stdout."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastcircuit.errors import InputError, RunError

app = typer.Typer(
    help="Find circuits in transformers: discover, evaluate, compare, draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class EmbeddingNodes(str, Enum):
    split = "split"
    joint = "joint"
    none = "none"


Model = Annotated[
    str, typer.Argument(help="Hugging Face id, local directory, or a shipped model (see `fastcircuit info`).")
]
TaskName = Annotated[str | None, typer.Option("--task", help="Task by name (see `fastcircuit info`).")]
DataFile = Annotated[
    Path | None, typer.Option("--data", help='JSONL of pairs: {"clean": "a <predict>b</predict>", "corrupted": "c"}.')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
OnDevice = Annotated[Device, typer.Option(help="Where to run; auto takes a GPU when there is one.")]
InDtype = Annotated[Dtype, typer.Option(help="Precision of the model.")]
Nodes = Annotated[
    EmbeddingNodes,
    typer.Option(help="Embeddings as writers: token and position (split), one (joint), or always kept (none)."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def main() -> None:
    """Run the command line; user errors become one line and exit code 2 (bad input) or 1 (the run failed)."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (InputError, RunError) as error:
        if debug:
            raise
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        stderr.print("interrupted; nothing was left half-written", style="red")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        stderr.print(
            f"error: unexpected {type(error).__name__}: {message} (--debug shows where)", style="red", markup=False
        )
        sys.exit(1)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices, backends (and why one is missing), shipped models and tasks."""
    from fastcircuit.report.tables import info_table
    from fastcircuit.system import system_info

    found = system_info()
    if as_json:
        _print_json(found)
    else:
        stdout.print(info_table(found))


@app.command()
def discover(
    model: Model,
    task: TaskName = None,
    data: DataFile = None,
    method: Annotated[str, typer.Option(help="How to find the circuit: edge-pruning.")] = "edge-pruning",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of edges to remove, in [0, 1). Default 0.95.", show_default=False)
    ] = None,
    edges: Annotated[int | None, typer.Option(help="Number of edges to keep, instead of --sparsity.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    preset: Annotated[str | None, typer.Option(help="Published hyperparameters of an experiment, e.g. ioi.")] = None,
    upstream_compat: Annotated[
        bool, typer.Option("--upstream-compat", help="Reproduce the published code's numerics, quirks included.")
    ] = False,
    ablation: Annotated[
        str | None, typer.Option(help="What a removed edge carries: interchange, mean or zero.")
    ] = None,
    embedding_nodes: Nodes = EmbeddingNodes.split,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    out: Annotated[Path | None, typer.Option(help="Directory to write to. Default runs/MODEL-TASK.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to --out/tensorboard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the edges of MODEL that carry a task; writes circuit.json and masks.safetensors."""
    from fastcircuit.discovery import preset as preset_settings
    from fastcircuit.discovery.run import Run
    from fastcircuit.discovery.settings import Settings
    from fastcircuit.report.tables import metrics_table

    given = {"steps": steps, "batch_size": batch_size, "ablation": ablation, "seed": seed}
    if upstream_compat:
        given["upstream_compat"] = True
    settings = preset_settings(preset) if preset else Settings()
    changes = {name: value for name, value in given.items() if value is not None}
    masked = _load_model(model, device, dtype, embedding_nodes)
    pairs = _load_task(model, task, data, seed)
    run = Run(
        out or Path("runs") / f"{Path(model).name}-{pairs.name}",
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
    )
    started = time.perf_counter()
    with _progress("discover") as on_report:
        circuit = run.discover(masked, pairs, method, settings.changed(changes), sparsity, edges, on_report)
    result = {
        "edges": circuit.num_edges,
        "total_edges": circuit.graph.num_edges,
        "sparsity": circuit.sparsity,
        **circuit.metrics,
        "seconds": time.perf_counter() - started,
    }
    files = [str(path) for path in run.files]
    if as_json:
        _print_json({"discover": result, "files": files})
    else:
        stdout.print(metrics_table(circuit))
        stdout.print("wrote " + ", ".join(files), soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    circuit: Annotated[Path, typer.Argument(help="circuit.json, or an edges.json of the Edge Pruning code.")],
    task: TaskName = None,
    data: DataFile = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    embedding_nodes: Annotated[
        EmbeddingNodes | None, typer.Option(help="Of an edges.json; a circuit.json says so itself.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """How faithful a circuit is: KL, accuracy, logit difference, exact match."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.evaluation.faithfulness import evaluate as measure
    from fastcircuit.report.tables import metrics_table

    loaded = None if embedding_nodes else Circuit.load(circuit)
    nodes = embedding_nodes or EmbeddingNodes(loaded.graph.embedding_nodes if loaded else "split")
    masked = _load_model(model, device, dtype, nodes)
    kept = loaded or Circuit.load(circuit, masked.graph)
    pairs = _load_task(model, task or (None if data else kept.task), data, seed)
    metrics = measure(masked, kept, pairs, split)
    if as_json:
        _print_json(
            {"edges": kept.num_edges, "total_edges": kept.graph.num_edges, "sparsity": kept.sparsity, split: metrics}
        )
    else:
        stdout.print(metrics_table(dataclasses.replace(kept, metrics={split: metrics})))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A circuit.json.")],
    second: Annotated[Path, typer.Argument(help="A circuit.json over the same graph.")],
    intersection: Annotated[Path | None, typer.Option(help="Write the common edges as a circuit.")] = None,
    union: Annotated[Path | None, typer.Option(help="Write all edges of both as a circuit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Overlap of two circuits; can write their intersection and union."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.evaluation.overlap import overlap
    from fastcircuit.report.tables import overlap_table

    a, b = Circuit.load(first), Circuit.load(second)
    found = overlap(a, b)
    for path, both in ((intersection, a & b), (union, a | b)):
        if path is not None:
            both.save(path)
    if as_json:
        _print_json(found)
    else:
        stdout.print(overlap_table(found, first.name, second.name))


@app.command()
def draw(
    circuit: Annotated[Path, typer.Argument(help="A circuit.json.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Picture to write: .svg, .png or .html (interactive).")
    ] = Path("circuit.html"),
    as_json: AsJson = False,
) -> None:
    """Draw a circuit, layers as rows."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.report import draw as draw_circuit

    loaded = Circuit.load(circuit)
    draw_circuit(loaded, out)
    if as_json:
        _print_json({"edges": loaded.num_edges, "files": [str(out)]})
    else:
        stdout.print(f"wrote {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write to.")] = Path("runs/demo"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on a shipped model: find the circuit that says She or He, evaluate it, draw it."""
    from fastcircuit.demo import run_demo
    from fastcircuit.report.tables import metrics_table

    with _progress("discover") as on_report:
        story = run_demo(out, seed, on_report)
    if as_json:
        _print_json(story.to_dict())
    else:
        stdout.print(metrics_table(story.circuit))
        stdout.print(f"took {story.seconds:.0f} s; wrote " + ", ".join(map(str, story.files)), soft_wrap=True)
    story.check()


def _load_model(name: str, device: Device, dtype: Dtype, embedding_nodes: EmbeddingNodes) -> Any:
    from fastcircuit.models.loading import load_model

    return load_model(name, device.value, dtype.value, embedding_nodes.value)


def _load_task(model: str, task: str | None, data: Path | None, seed: int) -> Any:
    from fastcircuit.models.loading import load_tokenizer
    from fastcircuit.tasks import load_task, names

    if (task is None) == (data is None):
        raise InputError(f"say what to explain: --task NAME ({', '.join(names())}) or --data PAIRS.jsonl, one of them")
    if data is not None and not data.exists():
        raise InputError(f"data file {data} does not exist")
    return load_task(str(data or task), load_tokenizer(model), seed=seed)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr with KL, sparsity, rate and time left; yields the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed or 0:5.1f} steps/s")

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    ]
    columns.append(TextColumn("KL {task.fields[kl]:.3f}  sparsity {task.fields[sparsity]:.1%}"))
    with Progress(*columns, console=stderr, transient=not stderr.is_terminal) as progress:
        bar = progress.add_task(what, total=None, kl=0.0, sparsity=0.0)

        def on_report(report: Any) -> None:
            progress.update(
                bar, total=report.steps, completed=report.step + 1, kl=report.kl, sparsity=report.edge_sparsity
            )

        yield on_report


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))

"""The command line: arguments in, tables and files out. Progress goes to stderr, ``--json`` to stdout."""

import dataclasses
import json
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from fastcircuit.errors import InputError, RunError

app = typer.Typer(
    help="Find circuits in transformers, and extract them as smaller models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)
INTERRUPTED = 130  # what typer returns when a command is stopped by Ctrl-C
# ClickException, which some versions of typer take from click and others from a copy of their own.
UsageError: type[Exception] = typer.BadParameter.__mro__[2]


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class EmbeddingNodes(Enum):
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
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(_run(arguments or ["--help"]))
    except (InputError, UsageError) as error:
        if debug:
            raise
        _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except RunError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _run(arguments: list[str]) -> int:
    """The exit code of a command that was not stopped by an error."""
    try:
        code = app(args=arguments, prog_name="fastcircuit", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted; nothing was left half-written", 1)
    return code or 0


def _fail(message: str, code: int) -> NoReturn:
    """Print ``message`` as one line on stderr and exit."""
    stderr.print(f"error: {' '.join(message.split())}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


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
    from fastcircuit.files import check_writable
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import metrics_table

    given = {"steps": steps, "batch_size": batch_size, "ablation": ablation, "seed": seed}
    if upstream_compat:
        given["upstream_compat"] = True
    changes = {name: value for name, value in given.items() if value is not None}
    settings = (preset_settings(preset) if preset else Settings()).changed(changes)
    _check_source(task, data)
    where = out or Path("runs") / f"{Path(model).name}-{data.stem if data else task}"
    run = Run(where, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    check_writable(where)
    masked = _load_model(model, device, dtype, embedding_nodes)
    pairs = _load_task(model, masked, task, data, seed)
    started = time.perf_counter()
    with watch(stderr) as watcher:
        circuit = run.discover(masked, pairs, method, settings, sparsity, edges, watcher.on_report, watcher.on_round)
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
    if loaded and task is None and data is None:
        task = loaded.task
    _check_source(task, data)
    nodes = embedding_nodes or EmbeddingNodes(loaded.graph.embedding_nodes if loaded else "split")
    masked = _load_model(model, device, dtype, nodes)
    kept = loaded or Circuit.load(circuit, masked.graph)
    pairs = _load_task(model, masked, task, data, seed)
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
def extract(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the submodel to; must not exist.")],
    task: TaskName = None,
    data: DataFile = None,
    ablation: Annotated[
        str, typer.Option(help="What a removed component writes: mean, mean-positional or zero.")
    ] = "mean",
    threshold: Annotated[
        float, typer.Option(help="Remove a component if the KL rises by less than this many nats.")
    ] = 0.01,
    kl_budget: Annotated[float | None, typer.Option(help="Largest total KL, in nats.")] = None,
    size_budget: Annotated[
        float | None, typer.Option(help="Stop when this fraction of the parameters (without embeddings) is left.")
    ] = None,
    no_mlps: Annotated[bool, typer.Option("--no-mlps", help="Remove heads only.")] = False,
    circuit: Annotated[
        Path | None, typer.Option(help="Keep what this circuit.json keeps, instead of searching.")
    ] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Logits of the task's answer tokens only; cannot generate text.")
    ] = False,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Turn MODEL into a smaller model that is enough for a task; writes a Hugging Face model directory."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.extraction.extract import run_extraction, speed_of
    from fastcircuit.files import check_new
    from fastcircuit.models.loading import load_tokenizer
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import extraction_table, speed_table

    _check_source(task, data)
    check_new(out)
    chosen = Circuit.load(circuit) if circuit else None
    masked = _load_model(model, device, dtype, EmbeddingNodes(chosen.graph.embedding_nodes if chosen else "split"))
    pairs = _load_task(model, masked, task, data, seed)
    with watch(stderr) as watcher:
        extraction = run_extraction(
            masked,
            pairs,
            ablation=ablation,
            threshold=threshold,
            kl_budget=kl_budget,
            size_budget=size_budget,
            include_mlps=not no_mlps,
            circuit=chosen,
            answers_only=answers_only,
            seed=seed,
            on_candidate=watcher.on_candidate,
        )
    rows = speed_of(masked, extraction, pairs)
    extraction.save(out, load_tokenizer(model), rows)
    found, speed = extraction.to_dict(), [row.to_dict() for row in rows]
    if as_json:
        _print_json({"extract": {**found, "speed": speed}, "directory": str(out)})
    else:
        stdout.print(extraction_table(found, pairs.name), speed_table(speed))
        stdout.print(f"wrote {out}", soft_wrap=True)


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
def convert(
    circuit: Annotated[Path, typer.Argument(help="A circuit of this or another tool, .json or .json.gz.")],
    out: Annotated[Path, typer.Argument(help="File to write; .gz is compressed.")],
    to: Annotated[
        str, typer.Option(help="Format to write: fastcircuit, edge-pruning, eap-ig or acdc.")
    ] = "fastcircuit",
    edges: Annotated[int | None, typer.Option(help="Keep so many edges with the largest scores instead.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the circuit, for a file that does not say so (only its config is read)."),
    ] = None,
    embedding_nodes: Annotated[
        EmbeddingNodes | None,
        typer.Option(help="Count embeddings so. Default: as the file does; with --model split.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a circuit for another tool: Edge Pruning, EAP-IG and the MIB track, ACDC."""
    from fastcircuit.formats import read, to_graph, write
    from fastcircuit.models.loading import load_graph

    graph = load_graph(model, embedding_nodes.value if embedding_nodes else "split") if model else None
    file = read(circuit, graph)
    if edges is not None:
        file = dataclasses.replace(file, circuit=file.top(edges))
    if embedding_nodes and file.graph.embedding_nodes != embedding_nodes.value:
        wanted = dataclasses.replace(file.graph, embedding_nodes=embedding_nodes.value)
        file = type(file)(file.format, to_graph(file.circuit, wanted))
    write(out, file, to)
    kept = file.circuit
    if as_json:
        _print_json({"edges": kept.num_edges, "total_edges": kept.graph.num_edges, "format": to, "files": [str(out)]})
    else:
        stdout.print(f"wrote {out}: {kept}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write to.")] = Path("runs/demo"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on a shipped model: find the circuit that says She or He, evaluate, draw and extract it."""
    from fastcircuit.demo import run_demo
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import extraction_table, metrics_table, speed_table

    with watch(stderr) as watcher:
        story = run_demo(out, seed, watcher.on_report, watcher.on_round, watcher.on_candidate)
    if as_json:
        _print_json(story.to_dict())
    else:
        stdout.print(metrics_table(story.circuit), f"found in {story.seconds:.0f} s")
        stdout.print(extraction_table(story.extraction.to_dict(), story.extraction.task))
        stdout.print(speed_table([row.to_dict() for row in story.speed]))
        stdout.print("wrote " + ", ".join(map(str, story.files)), soft_wrap=True)
    story.check()


@app.command()
def serve(
    directories: Annotated[list[Path], typer.Argument(help="Submodels that `fastcircuit extract` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    max_batch_size: Annotated[int, typer.Option(help="Sequences of a model generated together at most.")] = 32,
    device: OnDevice = Device.auto,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision. Default: as saved.", show_default=False)] = None,
) -> None:
    """Serve submodels over OpenAI's completions API: /v1/models, /v1/completions, /health."""
    from fastcircuit.models.loading import choose_device
    from fastcircuit.serving.server import serve as run

    where = choose_device(device.value)
    run(directories, host, port, device=where, dtype=dtype and dtype.value, max_batch_size=max_batch_size)


@bench_app.command("submodel")
def bench_submodel(
    directory: Annotated[Path, typer.Argument(help="A submodel that `fastcircuit extract` wrote.")],
    original: Annotated[
        str | None, typer.Option(help="The model it came from. Default: what the submodel's config says.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompts.", min=16)] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each call.", min=2)] = 10,
    compiled: Annotated[bool, typer.Option("--compiled", help="Time torch.compile of both too (minutes).")] = False,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Time a submodel beside the model it came from, and the speed-up beside its bound."""
    from fastcircuit.report.tables import speed_table
    from fastcircuit.submodel.saving import load_submodel
    from fastcircuit.submodel.speed import check_bounds, measure_speed

    submodel = load_submodel(directory, "cpu", dtype.value)
    name = original or (submodel.config.source or {}).get("model")
    if name is None:
        raise InputError(f"{directory} does not say what model it came from; name it with --original")
    full = _load_model(name, device, dtype, EmbeddingNodes.split).model
    submodel = submodel.to(full.device)
    rows = measure_speed(full, submodel, tokens, rounds=rounds)
    if compiled:
        rows += measure_speed(full, submodel, tokens, rounds=rounds, compiled=True)
    shown = [row.to_dict() for row in rows]
    if as_json:
        _print_json({"submodel": str(directory), "original": name, "rows": shown})
    else:
        stdout.print(speed_table(shown))
    check_bounds(rows)


def _load_model(name: str, device: Device, dtype: Dtype, embedding_nodes: EmbeddingNodes) -> Any:
    from fastcircuit.models.loading import load_model

    return load_model(name, device.value, dtype.value, embedding_nodes.value)


def _check_source(task: str | None, data: Path | None) -> None:
    """InputError unless there is one task or one file; before a model is loaded."""
    from fastcircuit.tasks import names

    known = ", ".join(names())
    if (task is None) == (data is None):
        raise InputError(f"say what to explain: --task NAME ({known}) or --data PAIRS.jsonl, one of them")
    if task is not None and task not in names():
        raise InputError(f"no task {task!r}; tasks: {known}; or give a file of your own with --data PAIRS.jsonl")
    if data is not None and not data.is_file():
        raise InputError(f"data file {data} does not exist" if not data.exists() else f"data file {data} is no file")


def _load_task(model: str, masked: Any, task: str | None, data: Path | None, seed: int) -> Any:
    from fastcircuit.models.loading import load_tokenizer
    from fastcircuit.tasks import load_task

    pairs = load_task(task or f"{data}", load_tokenizer(model), seed=seed)
    pairs.check_vocabulary(masked.config.vocab_size)
    return pairs


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False))

"""``fastcircuit bench [SUITE]``: one command per suite, and those about measurements."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.benchmarks import SUITES
from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import AsJson, Device, Dtype, EmbeddingNodes, InDtype, OnDevice
from fastcircuit.cli.sources import load_model
from fastcircuit.errors import InputError, RunError

RESULTS = Path("runs/bench")

Quick = Annotated[bool, typer.Option("--quick", help="Small shapes and few rounds: about a minute per suite.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: as many as torch takes.", min=1)]
Results = Annotated[Path, typer.Option("--results", help="Directory whose DEVICE.csv the rows are appended to.")]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    device: OnDevice = Device.auto,
    quick: Quick = False,
    threads: Threads = None,
    results: Results = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Measure: fastcircuit and its baselines in turns, each result checked first. Without SUITE: all suites."""
    if context.invoked_subcommand is None:
        run_suite("all", device, quick, threads, results, as_json)
        return
    if (device, quick, threads, results, as_json) != (Device.auto, False, None, RESULTS, False):
        raise InputError(f"options come behind the suite: fastcircuit bench {context.invoked_subcommand} --...")


def run_suite(suite: str, device: Device, quick: bool, threads: int | None, results: Path, as_json: bool) -> None:
    """Run a suite, print its table, append its rows; RunError when a gate is red or a number cannot be."""
    from fastcircuit.benchmarks import rows
    from fastcircuit.benchmarks.case import Target
    from fastcircuit.benchmarks.curves import curves
    from fastcircuit.benchmarks.environment import check_committed
    from fastcircuit.benchmarks.registry import load
    from fastcircuit.benchmarks.runner import run
    from fastcircuit.files import check_writable
    from fastcircuit.models.loading import choose_device
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import bench_table

    check_committed(results)
    check_writable(results)
    target = Target(choose_device(device.value), quick)
    cases = load(suite, target)
    with watch(stderr) as watcher:
        found = run(
            cases, target, threads=threads, on_case=watcher.on_case, keep=functools.partial(rows.append, results)
        )
    grown = curves(found.rows, cases)
    problems = found.problems + [problem for curve in grown if (problem := curve.problem()) is not None]
    files = rows.files(results, found.rows)
    if as_json:
        shown = [row.to_dict() for row in found.rows]
        seconds = {name: round(value, 1) for name, value in found.seconds.items()}
        written = [str(file) for file in files]
        fitted = [curve.to_dict() for curve in grown]
        print_json(
            {
                "suite": suite,
                "rows": shown,
                "curves": fitted,
                "files": written,
                "problems": problems,
                "seconds": seconds,
            }
        )
    else:
        stdout.print(bench_table([row.to_dict() for row in found.rows], [str(curve) for curve in grown]))
        for file in files:
            stdout.print(f"appended to {file}", markup=False, soft_wrap=True)
        took = ", ".join(f"{name} {value / 60:.1f}" for name, value in found.seconds.items())
        stdout.print(f"minutes: {took}", markup=False, soft_wrap=True)
    if problems:
        raise RunError("; ".join(problems))


def _command(suite: str) -> Callable[..., None]:
    def command(
        device: OnDevice = Device.auto,
        quick: Quick = False,
        threads: Threads = None,
        results: Results = RESULTS,
        as_json: AsJson = False,
    ) -> None:
        run_suite(suite, device, quick, threads, results, as_json)

    command.__doc__ = f"{SUITES[suite][:1].upper()}{SUITES[suite][1:]}."
    return command


for name in SUITES:
    app.command(name)(_command(name))


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="Results file or directory, or a commit.")],
    new: Annotated[str, typer.Argument(help="The same, to compare with.")],
    suite: Annotated[str, typer.Option(help="What commits are measured with.")] = "ops",
    as_json: AsJson = False,
) -> None:
    """Two runs beside each other: speed-ups with noise bands. Commits are checked out, built and timed in turns."""
    from fastcircuit.benchmarks.compare import compare as compare_runs
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import change_table

    if suite not in SUITES:
        raise InputError(f"no suite {suite!r}; suites: {', '.join(SUITES)}")
    with watch(stderr) as watcher:
        found = [change.to_dict() for change in compare_runs(old, new, suite, watcher.on_case)]
    if as_json:
        print_json({"old": old, "new": new, "changes": found})
    else:
        stdout.print(change_table(found, old, new))


@app.command()
def check(
    update: Annotated[bool, typer.Option("--update", help="Write what is measured as this machine's floors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ratios beside their committed floors; fails when one dropped by more than 20 %, its interval's upper end too.

    Floors are kept per instruction set and number of threads; those committed are of "avx512f, 2 threads".
    """
    from fastcircuit.benchmarks import floors
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import floor_table

    with watch(stderr) as watcher:
        if update:
            cases = floors.checked_cases()
            results = floors.measure(cases, floors.LONGER, watcher.on_case)
            found, problems = [], results.problems
            if not problems:
                floors.update(results, cases)
                found = floors.check(results)
        else:
            found, problems = floors.check_twice(watcher.on_case)
    shown = [{"case": f.case, "variant": f.variant, "floor": f.floor, "ratio": f.ratio} for f in found]
    dropped = [f"{f.case}: {f.variant} is at {f.ratio:.3g}, its floor is {f.floor:.3g}" for f in found if f.has_dropped]
    if as_json:
        print_json({"ratios": shown, "problems": problems + dropped})
    else:
        stdout.print(floor_table(shown))
    if problems or dropped:
        raise RunError("; ".join(problems + dropped))


@app.command()
def plot(
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="Directory for the pictures, SVG and PNG.")] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Draw what was measured: roofline, speed-ups, memory, sparsity, latency."""
    from fastcircuit.benchmarks.pictures import draw_all
    from fastcircuit.benchmarks.rows import read

    drawn, missing = draw_all(read(results), out)
    if as_json:
        print_json({"files": [str(path) for path in drawn], "missing": missing})
        return
    for path in drawn:
        stdout.print(f"{path}", markup=False, soft_wrap=True)
    for picture, suite in missing.items():
        stderr.print(f"no {picture}: there are no rows of it; `fastcircuit bench {suite}` measures them", markup=False)


@app.command()
def submodel(
    directory: Annotated[Path, typer.Argument(help="A submodel that `fastcircuit extract` wrote.")],
    original: Annotated[
        str | None, typer.Option(help="The model it came from. Default: what the submodel's config says.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompts.", min=16)] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each call.", min=2)] = 10,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile of both too; compiling takes minutes.")] = True,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Time a submodel beside the model it came from, and the speed-up beside its bound."""
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import speed_table
    from fastcircuit.submodel.saving import load_submodel
    from fastcircuit.submodel.speed import check_bounds, measure_speed

    smaller = load_submodel(directory, "cpu", dtype.value)
    name = original or (smaller.config.source or {}).get("model")
    if name is None:
        raise InputError(f"{directory} does not say what model it came from; name it with --original")
    try:
        full = load_model(name, device, dtype, EmbeddingNodes.split).model
    except InputError as error:
        if original is not None:
            raise
        raise InputError(f"{directory} came from {name!r}, but {error}; name that model with --original") from error
    smaller = smaller.to(full.device)
    with watch(stderr) as watcher:
        rows = measure_speed(full, smaller, tokens, rounds=rounds, compiled=compiled, on_row=watcher.on_row)
    shown = [row.to_dict() for row in rows]
    if as_json:
        print_json({"submodel": str(directory), "original": name, "rows": shown})
    else:
        stdout.print(speed_table(shown))
    check_bounds(rows)

"""``fastcircuit bench SUITE``: one function per suite."""

from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import AsJson, Device, Dtype, EmbeddingNodes, InDtype, OnDevice
from fastcircuit.cli.sources import load_model
from fastcircuit.errors import InputError

app = typer.Typer()


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure."""
    if context.invoked_subcommand is None:
        print(context.get_help())


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

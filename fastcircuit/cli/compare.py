"""``fastcircuit compare``."""

from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stdout
from fastcircuit.cli.options import AsJson


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
        print_json(found)
    else:
        stdout.print(overlap_table(found, first.name, second.name))

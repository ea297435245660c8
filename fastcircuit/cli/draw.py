"""``fastcircuit draw``."""

from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stdout
from fastcircuit.cli.options import AsJson


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
        print_json({"edges": loaded.num_edges, "files": [str(out)]})
    else:
        stdout.print(f"wrote {out}", soft_wrap=True)

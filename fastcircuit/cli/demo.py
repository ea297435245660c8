"""``fastcircuit demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import AsJson, Seed


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
        story = run_demo(out, seed, watcher.on_report, watcher.on_round, watcher.on_candidate, watcher.on_row)
    if as_json:
        print_json(story.to_dict())
    else:
        stdout.print(metrics_table(story.circuit), f"found in {story.seconds:.0f} s")
        stdout.print(extraction_table(story.extraction.to_dict(), story.extraction.task))
        stdout.print(speed_table([row.to_dict() for row in story.speed]))
        stdout.print("wrote " + ", ".join(map(str, story.files)), soft_wrap=True)
    story.check()

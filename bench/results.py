"""Rows of measurements, kept in the repository: one append-only CSV per case under bench/results/."""

import csv
import datetime
from pathlib import Path
from typing import Any

import torch

from fastcircuit.benchmarks.environment import commit, device_name

DIRECTORY = Path(__file__).parent / "results"


def record(case: str, rows: list[dict[str, Any]]) -> None:
    """Append ``rows`` to ``bench/results/CASE.csv``, each with the date, commit, machine and torch of the run."""
    path = DIRECTORY / f"{case}.csv"
    about = _about()
    names = [*rows[0], *about]
    DIRECTORY.mkdir(exist_ok=True)
    if path.exists():
        known = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        if known != names:
            raise ValueError(f"{path} has the columns {known}; these rows have {names}. Move the old file away.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


def _about() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": f"{device_name('cpu')} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

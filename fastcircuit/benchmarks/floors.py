"""Regressions: ratios within one run against committed floors, never absolute times: they hold on a noisy machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcircuit.benchmarks.case import Case, Target
from fastcircuit.benchmarks.registry import load
from fastcircuit.benchmarks.rows import Row
from fastcircuit.benchmarks.runner import OnCase, Results, run
from fastcircuit.benchmarks.timing import Budget
from fastcircuit.errors import InputError
from fastcircuit.files import read_json, write_json

FILE = Path(__file__).with_name("floors.json")
DROP = 0.2
SUITES = ("ops", "step", "cache", "inference")
BUDGET, LONGER = Budget(2.0, least_rounds=7), Budget(8.0, least_rounds=15)
FORMAT = "fastcircuit.floors/1"


@dataclass(frozen=True)
class Checked:
    """One ratio beside its floor.

    Args:
        high: the upper end of the interval that holds the ratio with 95 %.
    """

    case: str
    variant: str
    floor: float
    ratio: float
    high: float

    @property
    def has_dropped(self) -> bool:
        """Whether even the upper end lies more than DROP below the floor."""
        return self.high < (1 - DROP) * self.floor

    @property
    def is_doubtful(self) -> bool:
        """Whether the ratio has dropped by that much, surely or not."""
        return self.ratio < (1 - DROP) * self.floor


def checked_cases() -> list[Case]:
    """The cases that floors are kept of: the quick ones of SUITES with a baseline, on the CPU."""
    return [case for suite in SUITES for case in load(suite, Target("cpu", quick=True)) if case.baseline]


def machine(row: Row) -> str:
    """What floors are kept for: ratios depend on the instruction set and on the number of threads."""
    flags = row.cpu_flags.split()
    widest = next((flag for flag in ("avx512f", "avx2", "asimd") if flag in flags), "portable")
    return f"{widest}, {row.threads} threads"


def measure(cases: Sequence[Case], budget: Budget | None = None, on_case: OnCase | None = None) -> Results:
    return run(cases, Target("cpu", quick=True), budget=budget or BUDGET, on_case=on_case)


def check(results: Results, path: Path | None = None) -> list[Checked]:
    """The measured ratios of our variants that have a floor on this machine.

    Raises:
        InputError: there are none for this kind of machine; says how to record them.
    """
    rows = [row for row in results.rows if row.ratio is not None]
    if not rows:
        return []
    here = _read(path or FILE).get(machine(rows[0]), {})
    if not here:
        raise InputError(
            f"there are no floors for {machine(rows[0])}; record them on a quiet machine: `fastcircuit bench check "
            "--update`"
        )
    named = {_name(row): row for row in rows}
    return [
        Checked(row.case, row.variant, here[name], row.ratio or 0.0, row.ratio_high or 0.0)
        for name, row in named.items()
        if name in here
    ]


def check_twice(on_case: OnCase | None = None, path: Path | None = None) -> tuple[list[Checked], list[str]]:
    """Measure and check; what looks like a drop is measured again, longer, and only that counts."""
    cases = checked_cases()
    results = measure(cases, on_case=on_case)
    first = check(results, path)
    doubtful = {found.case for found in first if found.is_doubtful}
    again = [case for case in cases if case.key in doubtful]
    if not again:
        return first, results.problems
    second = measure(again, LONGER, on_case)
    kept = [found for found in first if found.case not in doubtful]
    return kept + check(second, path), [*results.problems, *second.problems]


def update(results: Results, cases: Sequence[Case], path: Path | None = None) -> int:
    """Write the measured ratios of our variants as this machine's floors; returns how many."""
    ours = {(case.key, name) for case in cases for name in case.ours}
    rows = [row for row in results.rows if row.ratio is not None and (row.case, row.variant) in ours]
    if not rows:
        raise InputError("nothing was measured, so there are no floors to write")
    path = path or FILE
    known = _read(path)
    known[machine(rows[0])] = {_name(row): round(row.ratio or 0.0, 3) for row in rows}
    write_json(path, {"format": FORMAT, "commit": rows[0].commit, "date": rows[0].date, "floors": known})
    return len(rows)


def _name(row: Row) -> str:
    return f"{row.case}: {row.variant}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    value = read_json(path, "floors")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} holds no floors ({FORMAT})")
    floors: dict[str, dict[str, Any]] = value["floors"]
    return floors

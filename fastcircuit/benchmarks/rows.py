"""Rows of measurements: their schema, and append-only CSV files, one per device."""

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastcircuit.benchmarks.environment import slug
from fastcircuit.errors import InputError, RunError


@dataclass(frozen=True)
class Row:
    """One variant of one case in one run. Times are of the whole, in milliseconds; empty: does not apply.

    Args:
        axis: what the curve is against, if the case is one; the variant is then the value.
        p20_ms, p50_ms, p80_ms: over ``rounds`` rounds.
        parts: the whole was not timed but one of so many equal parts.
        ratio: median over rounds of the baseline's time over this one's in the same round; above 1 this is faster.
        ratio_low, ratio_high: hold that median with 95 %.
        bound: what ``ratio`` can be at most.
        flops, bytes: the least the computation must do, counted from shapes.
        floor_ms: the time that takes at the measured ``matmul_gflops`` (GFLOP/s) and ``stream_gbs`` (GB/s).
        peak_bytes: memory above the operands.
    """

    suite: str
    name: str
    shape: str
    dtype: str
    axis: str
    variant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    parts: int
    baseline: str
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    bound: float | None
    flops: int | None
    bytes: int | None
    floor_ms: float | None
    percent_of_floor: float | None
    matmul_gflops: float | None
    stream_gbs: float | None
    peak_bytes: int | None
    quick: bool
    device: str
    cpu_flags: str
    threads: int
    driver: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs' rows are matched by."""
        return (self.suite, self.name, self.shape, self.dtype, self.variant)

    @property
    def case(self) -> str:
        return "/".join(self.key[:4])

    def to_dict(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


COLUMNS = tuple(field.name for field in fields(Row))
_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
}


def files(directory: Path, rows: Sequence[Row]) -> list[Path]:
    """Where ``rows`` belong: ``directory/DEVICE.csv``."""
    return [directory / f"{slug(device)}.csv" for device in dict.fromkeys(row.device for row in rows)]


def append(directory: Path, rows: Sequence[Row]) -> list[Path]:
    """Append ``rows`` to their files, whole rows or nothing; returns the files.

    Raises:
        InputError: a file there has other columns.
        RunError: a file cannot be written.
    """
    paths = files(directory, rows)
    for path in paths:
        if path.exists() and path.stat().st_size:
            _check_header(path)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(row.to_dict() for row in rows if files(directory, [row]) == [path])
                start = file.tell()
                try:
                    file.write(text.getvalue().encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}; choose another --results") from error
    return paths


def read(path: Path) -> list[Row]:
    """The rows of a results file, or of every ``.csv`` with this schema in a directory.

    Raises:
        InputError: there is no such file, or it is none of ours; names the line.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.csv") if _header(file) == list(COLUMNS))
        if not files:
            raise InputError(f"there are no results in {path}; `fastcircuit bench --results {path}` writes some")
        return [row for file in files for row in read(file)]
    if not path.is_file():
        raise InputError(f"results file {path} does not exist")
    _check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(path, number, values) for number, values in enumerate(csv.DictReader(file), start=2)]


def latest(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """The last row of every key on every device and number of threads."""
    return {(row.device, str(row.threads), *row.key): row for row in rows}


def _header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"results file {path} cannot be read: {error}") from error


def _check_header(path: Path) -> None:
    found = _header(path)
    if found != list(COLUMNS):
        other = next((name for name in (*found, *COLUMNS) if (name in found) != (name in COLUMNS)), "their order")
        raise InputError(f"{path} is no results file of this version (column {other!r}); move it away")


def _row(path: Path, number: int, values: dict[str, Any]) -> Row:
    if None in values or None in values.values():
        raise InputError(f"{path} line {number}: {len(COLUMNS)} columns are expected")
    read_values: dict[str, Any] = {}
    for field in fields(Row):
        text, kinds = values[field.name], str(getattr(field.type, "__name__", field.type)).split(" | ")
        if text == "" and "None" in str(field.type):
            read_values[field.name] = None
            continue
        try:
            value = _READ[kinds[0]](text)
        except (ValueError, KeyError):
            raise InputError(f"{path} line {number}: {field.name} is {text!r}; accepted: {field.type}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path} line {number}: {field.name} is {text!r}; accepted: a finite number")
        read_values[field.name] = value
    return Row(**read_values)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value

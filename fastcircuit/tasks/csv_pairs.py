"""Pairs from a CSV file, recognised by its header.

- ``clean,corrupted,label``: EAP-IG's greater-than. The prompts end in a century, the label is the two-digit year of the
  clean prompt; an ordered task over 00..99 (see ``greater_than.py``).
- ``clean,corrupted,correct_idx,incorrect_idx``: EAP-IG's other tasks. The right and the wrong next token, as token ids
  of the tokenizer the file was made for. An unnamed column of numbers and ``corrupted_hard`` may stand beside them;
  ``corrupted`` is used.
- ``clean,corrupted`` and perhaps ``distractor``, ``split``: what a JSONL file has, ``<predict>`` spans and all.
"""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks import jsonl
from fastcircuit.tasks.greater_than import DIGITS, Years
from fastcircuit.tasks.pairs_file import read_bytes, split_pairs
from fastcircuit.tasks.rows import Encoder, Row
from fastcircuit.tasks.task import SPLITS, Pair, Task, check_ids

LABEL = frozenset({"clean", "corrupted", "label"})
TOKENS = frozenset({"clean", "corrupted", "correct_idx", "incorrect_idx"})
SPANS = frozenset({"clean", "corrupted"})
_BESIDE = {LABEL: {"", "split"}, TOKENS: {"", "corrupted_hard", "split"}, SPANS: {"distractor", "split"}}
HEADERS = "clean,corrupted,label; clean,corrupted,correct_idx,incorrect_idx; clean,corrupted[,distractor][,split]"

Rows = list[tuple[str, dict[str, str]]]


def build(path: Path, tokenizer: Any, seed: int, sizes: Mapping[str, int], name: str, description: str) -> Task:
    """Read, check and tokenize the file; keep at most ``sizes[split]`` pairs of a split.

    Raises:
        InputError: one line that names the file, the line and the mend.
    """
    header, rows = read_rows(path)
    ordered = header >= LABEL
    answer_tokens: tuple[int, ...] | None = None
    if header >= TOKENS:
        pairs = _token_pairs(rows, Encoder(tokenizer, name))
    elif ordered:
        encoder = Encoder(tokenizer, name)
        digits = Years(encoder).tokens
        answer_tokens = tuple(digits.values())
        pairs = encoder.pairs([_year_row(row, where) for where, row in rows], digits)
    else:
        pairs = [jsonl.pair(_without_blanks(row), where, tokenizer) for where, row in rows]
    splits = [_split(row, where) for where, row in rows]
    examples = split_pairs(list(zip(splits, pairs, strict=True)), path, seed, sizes)
    return Task(name, examples, answer_tokens, description, ordered)


def read_rows(path: Path) -> tuple[frozenset[str], Rows]:
    """The columns, and "path line n" with the cells of each row by column; blank lines are fine."""
    raw = read_bytes(path, "a CSV file of pairs")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[tuple[str, list[str]]] = []
    where = f"{path} line 1"
    try:
        for cells in reader:
            if cells:
                lines.append((where, cells))
            where = f"{path} line {reader.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{where}: not valid CSV ({error}); quote cells that hold commas, quotes or lines") from None
    if not lines:
        raise InputError(f"{path} is empty; give a header and rows: {HEADERS}")
    header = [cell.strip() for cell in lines[0][1]]
    columns = _checked(header, path)
    for where, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells under a header of {len(header)}; quote cells with commas")
    if len(lines) == 1:
        raise InputError(f"{path} has a header and no rows; add at least one pair")
    return columns, [(where, dict(zip(header, cells, strict=True))) for where, cells in lines[1:]]


def _checked(header: list[str], path: Path) -> frozenset[str]:
    columns = frozenset(header)
    if len(columns) == len(header) and any(k <= columns <= k | extra for k, extra in _BESIDE.items()):
        return columns
    raise InputError(f"{path} line 1: its columns are {','.join(header)!r}; accepted: {HEADERS}")


def _split(row: Mapping[str, str], where: str) -> str | None:
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise InputError(f'{where}: "split" is {split!r}; accepted: {", ".join(SPLITS)}')
    return split


def _without_blanks(row: Mapping[str, str]) -> dict[str, str]:
    """A row as a JSONL file has it: an optional cell that is empty is not there."""
    return {column: cell for column, cell in row.items() if cell or column in SPANS}


def _year_row(row: Mapping[str, str], where: str) -> Row:
    """The label is the wrong answer that comes last, the year after it the right one that comes first."""
    label = _number(row, "label", where)
    if label > 98:
        raise InputError(f'{where}: "label" is {label}; give the two digits of the year in the clean prompt, 0 to 98')
    if not re.search(rf"\b\d\d{DIGITS[label]}\b", row["clean"]):
        raise InputError(f'{where}: "label" is {label} and no year of the clean prompt ends in {DIGITS[label]}')
    return Row(row["clean"], row["corrupted"], DIGITS[label + 1], DIGITS[label], where)


def _token_pairs(rows: Rows, encoder: Encoder) -> list[Pair]:
    """Pairs whose answers are given as token ids."""
    tokens: dict[str, int] = {}
    for where, row in rows:
        for column in ("correct_idx", "incorrect_idx"):
            tokens[row[column]] = _number(row, column, where)
            check_ids(0, tokens[row[column]], len(encoder.tokenizer), f'{where}, "{column}"')
    return encoder.pairs(
        [Row(row["clean"], row["corrupted"], row["correct_idx"], row["incorrect_idx"], where) for where, row in rows],
        tokens,
    )


def _number(row: Mapping[str, str], column: str, where: str) -> int:
    if not (row[column].isascii() and row[column].isdigit()):
        raise InputError(f'{where}: "{column}" is {row[column]!r}; give a number from 0')
    return int(row[column])

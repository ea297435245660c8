"""Pairs from a JSONL file, one object per line.

    {"clean": "Lily was sad.<predict> She</predict>", "corrupted": "Tim was sad.", "split": "train"}

``clean`` marks what to predict (see ``spans.py``). ``corrupted`` marks its own answer, which then is the distractor, or
is the plain prompt. Optional: ``distractor`` (a text, or a list with one per span) and ``split``. When no row has a
split, the rows are shuffled with the seed and dealt 60 % to train, 20 % to validation, 20 % to test.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.pairs_file import read_bytes, split_pairs
from fastcircuit.tasks.spans import encode_pair
from fastcircuit.tasks.task import SPLITS, Pair, Task

_REQUIRED = ("clean", "corrupted")
_KNOWN = (*_REQUIRED, "distractor", "split")


def build(path: Path, tokenizer: Any, seed: int, sizes: Mapping[str, int], name: str, description: str) -> Task:
    """Read, check and tokenize the file; keep at most ``sizes[split]`` pairs of a split.

    Raises:
        InputError: one line that names the file, the line and the mend.
    """
    pairs = [(row.get("split"), pair(row, where, tokenizer)) for where, row in read_rows(path)]
    return Task(name, split_pairs(pairs, path, seed, sizes), None, description)


def pair(row: Mapping[str, Any], where: str, tokenizer: Any) -> Pair:
    """A checked row as token ids."""
    return encode_pair(tokenizer, row["clean"], row["corrupted"], where, _distractors(row))


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of the file with "path line n" for each; blank lines, a BOM and CRLF are fine."""
    rows = []
    for number, line in enumerate(read_bytes(path, "a JSONL file of pairs").split(b"\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            rows.append((where, _parse_row(line, where)))
    if not rows:
        raise InputError(f'{path} is empty; give one {{"clean": ..., "corrupted": ...}} object per line')
    return rows


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    """One line as a checked object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: a {type(row).__name__}, not an object; write {{...}} with {' and '.join(_REQUIRED)}"
        )
    for key in row:
        if key not in _KNOWN:
            raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(_KNOWN)}")
    for key in _REQUIRED:
        if key not in row:
            raise InputError(f'{where}: "{key}" is missing; every pair needs a clean and a corrupted prompt')
        if not isinstance(row[key], str):
            raise InputError(f'{where}: "{key}" is {_kind(row[key])}; give a text')
    if "split" in row and row["split"] not in SPLITS:
        raise InputError(f'{where}: "split" is {row["split"]!r}; accepted: {", ".join(SPLITS)}')
    texts = row.get("distractor", "")
    if not isinstance(texts, str) and not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
        raise InputError(f'{where}: "distractor" is {_kind(texts)}; give a text, or a list with a text for each span')
    return row


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def _distractors(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    given = row.get("distractor")
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)

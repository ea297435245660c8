"""Pairs from a JSONL file, one object per line.

    {"clean": "Lily was sad.<predict> She</predict>", "corrupted": "Tim was sad.", "split": "train"}

``clean`` marks what to predict (see ``spans.py``). ``corrupted`` marks its own answer, which then is the distractor, or
is the plain prompt. Optional: ``distractor`` (a text, or a list with one per span) and ``split``. When no row has a
split, the rows are shuffled with the seed and dealt 60 % to train, 20 % to validation, 20 % to test.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.spans import encode_pair
from fastcircuit.tasks.task import SPLITS, Examples, Pair, Task

_REQUIRED = ("clean", "corrupted")
_KNOWN = (*_REQUIRED, "distractor", "split")


def build(path: Path, tokenizer: Any, seed: int, sizes: Mapping[str, int], name: str, description: str) -> Task:
    """Read, check and tokenize the file; keep at most ``sizes[split]`` pairs of a split.

    Raises:
        InputError: one line that names the file, the line and the mend.
    """
    rows = read_rows(path)
    pairs = [
        (row.get("split"), encode_pair(tokenizer, row["clean"], row["corrupted"], where, _distractors(row)))
        for where, row in rows
    ]
    by_split = _given_splits(pairs) if any(split for split, _ in pairs) else _dealt_splits(pairs, path, seed)
    splits = {split: Examples.from_pairs(by_split[split][: sizes.get(split)]) for split in SPLITS if by_split[split]}
    return Task(name, splits, None, description)


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of the file with "path line n" for each; blank lines, a BOM and CRLF are fine."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give a JSONL file of pairs") from None
    rows = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
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
            raise InputError(f'{where}: "{key}" is missing')
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


def _given_splits(pairs: list[tuple[str | None, Pair]]) -> dict[str, list[Pair]]:
    for split, pair in pairs:
        if split is None:
            raise InputError(f'{pair.where}: "split" is missing though other lines have it; give it to all or to none')
    return {name: [pair for split, pair in pairs if split == name] for name in SPLITS}


def _dealt_splits(pairs: list[tuple[str | None, Pair]], path: Path, seed: int) -> dict[str, list[Pair]]:
    """60/20/20, at least one pair each."""
    if len(pairs) < len(SPLITS):
        raise InputError(
            f'{path} has {len(pairs)} pair(s), too few to deal into {", ".join(SPLITS)}; add pairs or a "split" to each'
        )
    shuffled = [pair for _, pair in pairs]
    random.Random(seed).shuffle(shuffled)
    held_out = max(1, len(pairs) // 5)
    train = len(pairs) - 2 * held_out
    return dict(zip(SPLITS, (shuffled[:train], shuffled[train:-held_out], shuffled[-held_out:]), strict=True))

"""Tasks: pairs of clean and corrupted prompts with answers, in train, validation and test splits.

    task = load_task("pronoun", tokenizer)        # or a file of your own: load_task("pairs.jsonl", tokenizer)

To add a task: one file here with ``build(tokenizer, seed, sizes) -> Task``, its data under ``data/``, one line in
``_BUILDERS`` (or in ``_FILES`` when it is a list of pairs). ``rows.py`` is what generated tasks share.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError, check_seed
from fastcircuit.tasks import (
    acronyms,
    boolean,
    csv_pairs,
    docstring,
    gendered_pronoun,
    greater_than,
    induction,
    ioi,
    jsonl,
    pronoun,
    tracr,
)
from fastcircuit.tasks.task import SPLITS, Examples, Pair, Task

__all__ = ["Examples", "Pair", "Task", "load_task", "names"]

_DATA = Path(__file__).resolve().parent / "data"
_BUILDERS: dict[str, tuple[Callable[..., Task], Mapping[str, int]]] = {
    "induction": (induction.build, induction.SIZES),
    "pronoun": (pronoun.build, pronoun.SIZES),
    **ioi.BUILDERS,
    **greater_than.BUILDERS,
    **gendered_pronoun.BUILDERS,
    **boolean.BUILDERS,
    **acronyms.BUILDERS,
    **docstring.BUILDERS,
    "tracr-reverse": (tracr.build_reverse, tracr.SIZES),
    "tracr-xproportion": (tracr.build_xproportion, tracr.SIZES),
}
_FILES = {"pronoun-212": (_DATA / "pronoun_212.jsonl", "Say She or He by the name: 212 pairs written by hand.")}


def names() -> list[str]:
    """The tasks that ship with the package, sorted."""
    return sorted((*_BUILDERS, *_FILES))


def load_task(
    name_or_path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Task:
    """A shipped task by name, or the pairs of a JSONL or CSV file, tokenized with ``tokenizer``.

    Args:
        name_or_path: one of :func:`names`, or a file (``jsonl.py`` and, for ``.csv``, ``csv_pairs.py`` say its format).
        tokenizer: a fast Hugging Face tokenizer, the model's own.
        seed: decides what is generated and how it is split. The same seed gives the same task.
        sizes: pairs per split, in place of the task's own, e.g. ``{"train": 64}``; a file gives at most as many.

    Raises:
        InputError: no such task or file, a row that is wrong, a tokenizer the task does not fit, a seed below 0.
    """
    sizes = _checked(sizes or {})
    check_seed(seed)
    name = os.fspath(name_or_path)
    if name in _BUILDERS:
        build, own_sizes = _BUILDERS[name]
        return build(tokenizer, seed, {**own_sizes, **sizes})
    if name in _FILES:
        path, description = _FILES[name]
        return jsonl.build(path, tokenizer, seed, sizes, name, description)
    path = Path(name)
    if not path.exists():
        known = ", ".join(names())
        raise InputError(f"no task and no file {name!r}; tasks: {known}; or give a JSONL or CSV file of pairs")
    build_file = csv_pairs.build if path.suffix.lower() == ".csv" else jsonl.build
    return build_file(path, tokenizer, seed, sizes, path.stem, f"Pairs from {path.name}.")


def _checked(sizes: Mapping[str, int]) -> Mapping[str, int]:
    for split, size in sizes.items():
        if split not in SPLITS:
            raise InputError(f"sizes names a split {split!r}; accepted: {', '.join(SPLITS)}")
        if not isinstance(size, int) or size < 1:
            raise InputError(f"sizes gives {split} {size!r} pairs; give a number from 1")
    return sizes

"""What files of pairs have in common: reading bytes, and dealing rows into splits."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastcircuit.errors import InputError
from fastcircuit.tasks.task import SPLITS, Examples, Pair


def read_bytes(path: Path, what: str) -> bytes:
    """The file without a byte order mark; ``what`` says what should have been given."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give {what}") from None


def split_pairs(
    pairs: Sequence[tuple[str | None, Pair]], path: Path, seed: int, sizes: Mapping[str, int]
) -> dict[str, Examples]:
    """The examples of each split, at most ``sizes[split]`` of it.

    Each pair comes with the split its row names, or None: then all rows are shuffled with the seed and dealt 60 % to
    train, 20 % to validation and 20 % to test.

    Raises:
        InputError: some rows name a split and others do not, or there are too few to deal.
    """
    by_split = _given(pairs) if any(split for split, _ in pairs) else _dealt([pair for _, pair in pairs], path, seed)
    return {
        split: Examples.from_pairs(by_split[split][: sizes.get(split)], name=f"the {split} split of {path}")
        for split in SPLITS
        if by_split[split]
    }


def _given(pairs: Sequence[tuple[str | None, Pair]]) -> dict[str, list[Pair]]:
    for split, pair in pairs:
        if split is None:
            raise InputError(f'{pair.where}: "split" is missing though other lines have it; give it to all or to none')
    return {name: [pair for split, pair in pairs if split == name] for name in SPLITS}


def _dealt(pairs: list[Pair], path: Path, seed: int) -> dict[str, list[Pair]]:
    """60/20/20, at least one pair each."""
    if len(pairs) < len(SPLITS):
        raise InputError(
            f'{path} has {len(pairs)} pair(s), too few to deal into {", ".join(SPLITS)}; add pairs or a "split" to each'
        )
    random.Random(seed).shuffle(pairs)
    held_out = max(1, len(pairs) // 5)
    train = len(pairs) - 2 * held_out
    return dict(zip(SPLITS, (pairs[:train], pairs[train:-held_out], pairs[-held_out:]), strict=True))

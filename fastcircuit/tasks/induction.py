"""Induction: continue a repeated pattern of letters ("crlbswrlbsw" -> "r").

The strings are those `induction-gpt2` was trained on: draw letters until one comes back, then repeat what followed it.
With the first ``onset`` letters distinct, the last ``period`` of them repeat; ``onset`` is distributed as in the
birthday problem with 26 days and ``period`` is uniform in 1..onset. Every letter that follows a letter seen before is
predictable, and asked for.

The corrupted string begins to repeat at the same place with another period and differs in every position. The other
period matters: if both strings repeated alike, the attention pattern taken from the corrupted run would already look
at the right place, and the edges that compute it would seem unimportant.
"""

import random
from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.task import Examples, Pair, Task

LENGTH = 31
SIZES = {"train": 1024, "validation": 256, "test": 512}


def build(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Generate the splits; no clean string occurs twice. The tokenizer must have one token per letter."""
    generator = random.Random(f"induction {seed}")
    prefix, letters = _letter_tokens(tokenizer)
    seen: set[str] = set()
    splits = {}
    for name, size in sizes.items():
        pairs: list[Pair] = []
        while len(pairs) < size:
            clean, corrupted, onset = generate(generator)
            if clean not in seen:
                seen.add(clean)
                pairs.append(_pair(prefix, letters, clean, corrupted, onset))
        splits[name] = Examples.from_pairs(pairs, name=name)
    return Task("induction", splits, None, "Continue a repeated pattern of letters.")


def generate(generator: random.Random) -> tuple[str, str, int]:
    """A clean string, its corrupted twin, and the index of the first letter that is a repetition.

    One-letter strings ("yyyy...") are left out: no other period begins to repeat as early.
    """
    onset = 1
    while onset == 1:
        seen = {generator.randrange(26)}
        while (letter := generator.randrange(26)) not in seen:
            seen.add(letter)
        onset = len(seen)
    period, other_period = generator.sample(range(1, onset + 1), 2)
    clean = repeat(generator.sample(ascii_lowercase, onset), period)
    corrupted = clean
    while any(a == b for a, b in zip(clean, corrupted, strict=True)):
        corrupted = repeat(generator.sample(ascii_lowercase, onset), other_period)
    return clean, corrupted, onset


def repeat(letters: list[str], period: int, length: int = LENGTH) -> str:
    """``letters``, then the last ``period`` of them over and over."""
    text = list(letters)
    while len(text) < length:
        text.append(text[-period])
    return "".join(text)


def _letter_tokens(tokenizer: Any) -> tuple[tuple[int, ...], dict[str, int]]:
    """The special tokens a text begins with, and the token of each letter."""
    try:
        ids = tokenizer(ascii_lowercase)["input_ids"]
        special = tokenizer(ascii_lowercase, return_special_tokens_mask=True)["special_tokens_mask"]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"task induction: the tokenizer cannot encode the letters a..z: {error}") from error
    first = special.index(0) if 0 in special else len(special)
    letters = [token for token, is_special in zip(ids, special, strict=True) if not is_special]
    if len(set(letters)) != 26 or len(letters) != 26:
        raise InputError(
            f"task induction needs a tokenizer with one token per letter; this one makes {len(letters)} of "
            f"{ascii_lowercase!r} (the model induction-gpt2 has one)"
        )
    return tuple(ids[:first]), dict(zip(ascii_lowercase, letters, strict=True))


def _pair(prefix: tuple[int, ...], letters: Mapping[str, int], clean: str, corrupted: str, onset: int) -> Pair:
    """Ask for every letter after the first repeated one; the distractor is the corrupted string's letter there."""
    asked = range(onset + 1, LENGTH)
    return Pair(
        clean=prefix + tuple(letters[c] for c in clean[:-1]),
        corrupted=prefix + tuple(letters[c] for c in corrupted[:-1]),
        positions=tuple(len(prefix) + i - 1 for i in asked),
        answers=tuple(letters[clean[i]] for i in asked),
        distractors=tuple(letters[corrupted[i]] for i in asked),
        where=f"induction string {clean!r}",
    )

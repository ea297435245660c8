"""Acronyms: "The Ketchup Lark Wreck (KL" -> "W".

Three nouns and the first two letters of their acronym; the answer is the third (Garcia-Carrasco et al. 2024). All
prompts have as many tokens: of the nouns those are taken whose capital is a token of its own and which have the
commonest number of tokens, as in the paper, or, where a tokenizer has few such, all of the commonest number of tokens.
The letters are a token each. The corrupted prompt has three other nouns and their letters; its third letter is the
distractor. The text begins with the beginning-of-text token where the tokenizer has one. No prompt is in two splits.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.files import read_json
from fastcircuit.tasks.rows import Encoder, Row, draw, examples
from fastcircuit.tasks.task import Task

_DATA = Path(__file__).resolve().parent / "data" / "acronyms.json"
_FEWEST = 40


def build(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Random triples of nouns of one shape."""
    encoder = Encoder(tokenizer, "acronyms", begin=True)
    every = read_json(_DATA, "acronyms task")["words"]
    words = _alike(encoder, every)
    generator = random.Random(f"acronyms {seed}")
    rows = draw("acronyms", sizes, lambda _: _rows(words, generator, _letters_apart(encoder, words)))
    about = f"Give the third letter of an acronym ({len(words)} of {len(every)} nouns, tokenized alike)."
    return Task("acronyms", examples(encoder, rows), None, about)


BUILDERS = {"acronyms": (build, {"train": 250, "validation": 250, "test": 250})}


def _alike(encoder: Encoder, words: Sequence[str]) -> list[str]:
    """The largest group of words that are tokenized alike, with the capital on its own if there are enough."""
    (before,) = encoder(["The"])
    capitals = sorted({word[0] for word in words})
    alone = {c: ids[len(before) :] for c, ids in zip(capitals, encoder([f"The {c}" for c in capitals]), strict=True)}
    groups: dict[tuple[bool, int], list[str]] = {}
    for word, ids in zip(words, encoder([f"The {word}" for word in words]), strict=True):
        tokens = ids[len(before) :]
        shape = (tokens[:1] == alone[word[0]] and len(tokens) > 1, len(tokens))
        groups.setdefault(shape, []).append(word)
    large = [shape for shape, group in groups.items() if len(group) >= _FEWEST]
    if not large:
        shape = max(groups, key=lambda shape: len(groups[shape]))
        raise InputError(
            f"task acronyms needs {_FEWEST} nouns that take as many tokens; this tokenizer has {len(groups[shape])} of "
            f"{shape[1]} tokens, such as {groups[shape][0]!r}; use another tokenizer"
        )
    return groups[max(large, key=lambda shape: (shape[0], len(groups[shape])))]


def _letters_apart(encoder: Encoder, words: Sequence[str]) -> Callable[[str], bool]:
    """Whether the tokenizer keeps the letters of an acronym apart."""
    before = len(encoder(["a ("])[0])

    @cache
    def apart(letters: str) -> bool:
        return len(encoder([f"a ({letters}"])[0]) == before + len(letters)

    if not any(apart(first + second) for first in {w[0] for w in words} for second in {w[0] for w in words}):
        raise InputError("task acronyms: this tokenizer has no single tokens for letters; use another tokenizer")
    return apart


def _rows(words: Sequence[str], generator: random.Random, apart: Callable[[str], bool]) -> Iterator[Row]:
    while True:
        drawn = generator.sample(words, 6)
        clean, corrupted = drawn[:3], drawn[3:]
        letters, others = ("".join(word[0] for word in three) for three in (clean, corrupted))
        if letters[2] != others[2] and apart(letters) and apart(others):
            yield Row(_prompt(clean), _prompt(corrupted), letters[2], others[2])


def _prompt(words: Sequence[str]) -> str:
    return f"The {' '.join(words)} ({words[0][0]}{words[1][0]}"

"""Tracr's programs: the whole input space of a compiled program (Edge Pruning, section 4; Conmy et al. 2023).

``tracr-reverse``: reverse a list of 1, 2, 3 ("BOS 1 3 2" -> "2 3 1"), asked for at all positions but BOS, where the
program's answer is undefined. ``tracr-xproportion``: which part of the tokens so far is x ("BOS x a x" ->
"0 1 1/2 2/3"), asked for at all positions; at BOS it is 0, and two edges of the circuit are there for that answer only.

The train split holds the published lists, all 27 of length 3 and all 256 of length 4; the test split all other lengths
up to 5 that the compiled models take. The corrupted list is another one of the same length, drawn at random.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.task import NOTHING, Examples, Pair, Task

LONGEST = 5
ALL = 4**LONGEST * 2  # more than there are of any split
SIZES = {"train": ALL, "test": ALL}


def _reverse(words: Sequence[str]) -> list[str | None]:
    """The program's answers at BOS and after it; None where there is none."""
    return [None, *reversed(words)]


def _xproportion(words: Sequence[str]) -> list[str | None]:
    return ["0", *(str(Fraction(words[:count].count("x"), count)) for count in range(1, len(words) + 1))]


def _build(
    name: str,
    program: Callable[[Sequence[str]], list[str | None]],
    words: str,
    train_length: int,
    description: str,
    tokenizer: Any,
    seed: int,
    sizes: Mapping[str, int],
) -> Task:
    """All lists of ``words``, or ``sizes[split]`` of a split drawn at random.

    Raises:
        InputError: the tokenizer lacks a word or an answer, or does not put BOS in front.
    """
    lengths = {"train": [train_length], "test": [n for n in range(1, LONGEST + 1) if n != train_length]}
    encode = _Encoder(name, tokenizer)
    splits = {}
    for split, size in sizes.items():
        if split not in lengths:
            raise InputError(f"task {name} has no split {split!r}; it has: {', '.join(lengths)}")
        generator = random.Random(f"{name} {seed} {split}")
        lists = [each for length in lengths[split] for each in product(words, repeat=length)]
        chosen = lists if size >= len(lists) else generator.sample(lists, size)
        splits[split] = Examples.from_pairs(
            [_pair(encode, program, each, _other(each, words, generator)) for each in chosen]
        )
    return Task(name, splits, None, description)


def _other(each: Sequence[str], words: str, generator: random.Random) -> tuple[str, ...]:
    """Another list of the same length."""
    other = tuple(each)
    while other == tuple(each):
        other = tuple(generator.choice(words) for _ in each)
    return other


def _pair(
    encode: "_Encoder",
    program: Callable[[Sequence[str]], list[str | None]],
    clean: Sequence[str],
    corrupted: Sequence[str],
) -> Pair:
    """Ask for every answer; the distractor is what the corrupted list has there, where it differs."""
    right, wrong = program(clean), program(corrupted)
    positions = [position for position, answer in enumerate(right) if answer is not None]
    answers, others = ([encode.token(given[position] or "") for position in positions] for given in (right, wrong))
    return Pair(
        clean=encode(clean),
        corrupted=encode(corrupted),
        positions=tuple(positions),
        answers=tuple(answers),
        distractors=tuple(NOTHING if a == b else b for a, b in zip(answers, others, strict=True)),
        where=f"the list {' '.join(clean)}",
    )


class _Encoder:
    """Words to token ids, BOS in front."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self.vocabulary, self.bos = name, tokenizer.get_vocab(), tokenizer.bos_token_id
        if self.bos is None:
            raise InputError(f"task {name} needs a tokenizer with a BOS token, such as that of the model {name}")

    def __call__(self, words: Sequence[str]) -> tuple[int, ...]:
        return (self.bos, *(self.token(word) for word in words))

    def token(self, word: str) -> int:
        """The id of a word; InputError when the vocabulary has none."""
        if word not in self.vocabulary:
            raise InputError(
                f"task {self.name}: the tokenizer has no token {word!r}; load the task with the tokenizer of the model "
                f"{self.name}, or of a program compiled for the same tokens"
            )
        token: int = self.vocabulary[word]
        return token


build_reverse = partial(_build, "tracr-reverse", _reverse, "123", 3, "Reverse a list of 1, 2, 3.")
build_xproportion = partial(
    _build, "tracr-xproportion", _xproportion, "abcx", 4, "Say which part of the tokens so far is x."
)

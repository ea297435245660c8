"""Greater-than: "The war lasted from 1743 to 17" -> 44, 45, ..., 99.

The year is one that the tokenizer splits into the century and two digits, and so is what the model answers: the 100
tokens 00..99 are the task's answer tokens, in this order, and metrics are restricted to them. The task is ordered: the
distractor is the year of the prompt, right are the tokens after it, and the answer given is the first of them.

Two forms (Hanna et al. 2023):

- ``greater-than``: five templates, 120 nouns, years 1100 to 2199 (Edge Pruning, section 4.1). Corrupted is the same
  sentence with another noun and another year.
- ``greater-than-extraction``: "The war lasted from the year 1743 to 17", centuries 11 to 17 (Garcia-Carrasco et al.
  2024, appendix A). Corrupted is the same sentence with a year that ends in 01 (Hanna et al.).

Years that leave no right or no wrong answer (00 and 99) are left out. No prompt is in two splits.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.files import read_json
from fastcircuit.tasks.rows import Encoder, Row, by_length, draw, examples
from fastcircuit.tasks.task import Task

_DATA = Path(__file__).resolve().parent / "data" / "greater_than.json"
DIGITS = tuple(f"{number:02d}" for number in range(100))


def greater_than(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Edge Pruning's templates and years."""
    words = read_json(_DATA, "greater-than task")
    encoder = Encoder(tokenizer, "greater-than")
    years = Years(encoder)
    starts = [year for year in years.split if 1 <= int(year[2:]) <= 98]
    nouns = list(by_length(encoder.lengths(words["nouns"], "The")).values())
    generator = random.Random(f"greater-than {seed}")

    def rows(_: str) -> Iterator[Row]:
        while True:
            template, year, other_year = generator.choice(words["templates"]), *generator.sample(starts, 2)
            (alike,) = generator.choices(nouns, [len(group) for group in nouns])
            noun, other_noun = generator.choice(alike), generator.choice(alike)
            yield _row(template, (noun, year), (other_noun, other_year))

    return _task(encoder, years, starts, rows, sizes)


def greater_than_extraction(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """The circuit extraction paper's template and years."""
    words = read_json(_DATA, "greater-than task")
    encoder = Encoder(tokenizer, "greater-than-extraction")
    years = Years(encoder)
    firsts = {year[:2]: year for year in years.split if year < "1800" and year.endswith("01")}
    starts = [year for year in years.split if year[:2] in firsts and 2 <= int(year[2:]) <= 98]
    generator = random.Random(f"greater-than-extraction {seed}")

    def rows(_: str) -> Iterator[Row]:
        while True:
            noun, year = generator.choice(words["nouns"]), generator.choice(starts)
            yield _row(words["template_extraction"], (noun, year), (noun, firsts[year[:2]]))

    return _task(encoder, years, starts, rows, sizes)


BUILDERS = {
    "greater-than": (greater_than, {"train": 150, "validation": 150, "test": 12240}),
    "greater-than-extraction": (greater_than_extraction, {"train": 250, "validation": 250, "test": 250}),
}


class Years:
    """The years 1100 to 2199 that the tokenizer reads as a century and two digits, and the tokens of the digits.

    Raises:
        InputError: 00..99 are not a single token each, or no year is read so; names the first that is not.
    """

    def __init__(self, encoder: Encoder) -> None:
        (hyphen,) = encoder(["17-"])
        self.tokens: dict[str, int] = {}
        for digits, ids in zip(DIGITS, encoder([f"17-{digits}" for digits in DIGITS]), strict=True):
            if ids[:-1] != hyphen or ids[-1] in self.tokens.values():
                raise InputError(
                    f"task {encoder.task} needs a tokenizer in which 00..99 are a token each; {digits!r} is none in "
                    "this one; use GPT-2's or one like it"
                )
            self.tokens[digits] = ids[-1]
        centuries = [str(century) for century in range(11, 22)]
        prefixes = dict(zip(centuries, encoder([f"to {century}" for century in centuries]), strict=True))
        years = [century + digits for century in centuries for digits in DIGITS]
        self.split = [
            year
            for year, ids in zip(years, encoder([f"to {year}" for year in years]), strict=True)
            if ids == [*prefixes[year[:2]], self.tokens[year[2:]]]
        ]
        if not self.split:
            raise InputError(f"task {encoder.task}: this tokenizer reads no year as a century and two digits, not 1743")


def _row(template: str, clean: tuple[str, str], corrupted: tuple[str, str]) -> Row:
    """Both prompts of a noun and a year each; the year is the distractor, the one after it the answer."""
    right, wrong = (template.format(noun=noun, start=year, century=year[:2]) for noun, year in (clean, corrupted))
    digits = clean[1][2:]
    return Row(right, wrong, DIGITS[int(digits) + 1], digits)


def _task(
    encoder: Encoder,
    years: Years,
    starts: Sequence[str],
    rows: Callable[[str], Iterator[Row]],
    sizes: Mapping[str, int],
) -> Task:
    drawn = draw(encoder.task, sizes, rows)
    about = f"Give a year after the one in the prompt ({len(starts)} years that are a century and two digits)."
    return Task(encoder.task, examples(encoder, drawn, years.tokens), tuple(years.tokens.values()), about, ordered=True)

"""Docstring: name the next argument in the order of the definition (Heimersheim and Janiak 2023, as ACDC runs it).

    def port(self, load, size, files, state, last, item):
        '''order result word

        :param files: table sun
        :param state: cake light
        :param
                                                            -> " last"

The definition has two arguments before and one after the three that the docstring goes through. The corrupted prompt
has others in both places, so that nothing says which comes next; the distractor is another argument of the definition.
The text begins with the beginning-of-text token where the tokenizer has one. No prompt is in two splits.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcircuit.files import read_json
from fastcircuit.tasks.rows import Encoder, Row, draw, examples
from fastcircuit.tasks.task import Task

_DATA = Path(__file__).resolve().parent / "data" / "docstring.json"
_FEWEST = 20


def build(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Random names and nouns that are a single token each."""
    words = read_json(_DATA, "docstring task")
    encoder = Encoder(tokenizer, "docstring", begin=True)
    distinct = [noun for noun in words["nouns"] if noun not in words["variables"]]  # no answer in a description
    names = encoder.single_tokens(words["variables"], _FEWEST, "argument names", ":param")
    nouns = encoder.single_tokens(distinct, _FEWEST, "nouns", ":")
    generator = random.Random(f"docstring {seed}")
    rows = draw("docstring", sizes, lambda _: _rows(names, nouns, generator))
    left_out = len(words["variables"]) + len(distinct) - len(names) - len(nouns)
    without = f", without {left_out} words that are no single token" if left_out else ""
    about = f"Name the next argument in a docstring ({len(names)} names, {len(nouns)} nouns{without})."
    return Task("docstring", examples(encoder, rows), None, about)


BUILDERS = {"docstring": (build, {"train": 50, "validation": 50, "test": 50})}


def _rows(names: Sequence[str], nouns: Sequence[str], generator: random.Random) -> Iterator[Row]:
    while True:
        method, *drawn = generator.sample(names, 12)
        before, (first, second, answer), after = drawn[:2], drawn[2:5], drawn[5]
        summary = " ".join(generator.sample(nouns, 3))
        about = [" ".join(generator.sample(nouns, 2)) for _ in range(2)]
        yield Row(
            clean=_prompt(method, [*before, first, second, answer, after], summary, (first, second), about),
            corrupted=_prompt(method, [*before, *drawn[6:9], after], summary, drawn[9:], about),
            answer=f" {answer}",
            distractor=f" {generator.choice([*before, first, second, after])}",
        )


def _prompt(method: str, arguments: Sequence[str], summary: str, described: Sequence[str], about: Sequence[str]) -> str:
    lines = [f"    :param {name}: {text}" for name, text in zip(described, about, strict=True)]
    definition = f"def {method}(self, {', '.join(arguments)}):"
    return "\n".join(["", definition, f'    """{summary}', "", *lines, "    :param"])

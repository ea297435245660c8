"""Boolean expressions: "((not not True) and False) or True is" -> " True".

Edge Pruning, section 5: 3 to 6 literals, ``and`` and ``or`` nested at most 3 deep, at most 2 consecutive ``not``. An
operand that is not a literal stands in parentheses. The corrupted prompt is another expression of the same split with
as many tokens and the other value. No expression is in two splits.

Two prompts, as the published code ran them: ``boolean-instruction`` (Llama 2's chat mark-up) and ``boolean-few-shot``
(three demonstrations; appendix E prints them in chat mark-up, with which they would not fit the 72 tokens of the
published run).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.tasks.rows import Encoder, Row, examples
from fastcircuit.tasks.task import Task

FEWEST, MOST, DEEPEST, MOST_NOTS = 3, 6, 3, 2
SIZES = {"train": 3840, "validation": 767, "test": 3070}
INSTRUCTION = (
    "[INST] <<SYS>>\nEvaluate the following boolean expression as either 'True' or 'False'.\n<</SYS>>\n\n"
    "{expression} [/INST] '"
)
FEW_SHOT = (
    "(True and False) or (False and True) is False\n"
    "(True or (not True)) and False is False\n"
    "(not (True and False)) or (False and True) is True\n"
    "{expression} is"
)
_SPARE = 200  # expressions of a split beyond its size, as partners of the rare lengths


@dataclass(frozen=True)
class Expression:
    """A Boolean expression as text, its value, and how it is built."""

    text: str
    value: bool
    depth: int = 0
    nots: int = 0
    literal: bool = True

    def operand(self) -> str:
        return self.text if self.literal else f"({self.text})"

    def negated(self) -> "Expression":
        text = self.text if self.nots else self.operand()
        return Expression(f"not {text}", not self.value, self.depth, self.nots + 1, literal=False)

    def joined(self, other: "Expression", word: str) -> "Expression":
        value = self.value and other.value if word == "and" else self.value or other.value
        text = f"{self.operand()} {word} {other.operand()}"
        return Expression(text, value, 1 + max(self.depth, other.depth), literal=False)


def generate(generator: random.Random) -> Expression:
    """A random expression within the limits: random literals, joined and negated at random until one is left."""
    while True:
        parts = [
            Expression(str(value), value)
            for value in generator.choices((False, True), k=generator.randint(FEWEST, MOST))
        ]
        while len(parts) > 1:
            word = generator.choice(("and", "or", "not"))
            index = generator.randrange(len(parts) - (word != "not"))
            if word != "not":
                parts[index : index + 2] = [parts[index].joined(parts[index + 1], word)]
            elif parts[index].nots < MOST_NOTS:
                parts[index] = parts[index].negated()
        if parts[0].depth <= DEEPEST:
            return parts[0]


def build(form: str, prompt: str, gap: str, tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """``sizes[split]`` expressions in ``prompt``; ``gap`` stands before the answer."""
    encoder = Encoder(tokenizer, form)
    generator = random.Random(f"boolean {seed}")
    seen: set[str] = set()
    splits = {}
    for split, size in sizes.items():
        expressions = _distinct(generator, size + _SPARE, seen)
        lengths = [len(ids) for ids in encoder([prompt.format(expression=e.text) for e in expressions])]
        splits[split] = _partnered(expressions, lengths, size, generator, prompt, gap)
        if len(splits[split]) < size:
            raise InputError(
                f"task {form}: only {len(splits[split])} of {size} {split} expressions have a partner of as many "
                "tokens and the other value in this tokenizer; ask for fewer with sizes"
            )
    return Task(form, examples(encoder, splits), None, "Evaluate a Boolean expression.")


BUILDERS = {
    "boolean-instruction": (partial(build, "boolean-instruction", INSTRUCTION, ""), SIZES),
    "boolean-few-shot": (partial(build, "boolean-few-shot", FEW_SHOT, " "), SIZES),
}


def _distinct(generator: random.Random, count: int, seen: set[str]) -> list[Expression]:
    """``count`` expressions that are not in ``seen``, which they are added to."""
    expressions: list[Expression] = []
    for _ in range(50 * count):
        expression = generate(generator)
        if expression.text not in seen:
            seen.add(expression.text)
            expressions.append(expression)
            if len(expressions) == count:
                return expressions
    raise InputError(f"there are too few Boolean expressions for {count} more; ask for fewer with sizes")


def _partnered(
    expressions: Sequence[Expression],
    lengths: Sequence[int],
    size: int,
    generator: random.Random,
    prompt: str,
    gap: str,
) -> list[Row]:
    """The first ``size`` expressions that have a partner, each with one at random."""
    groups: dict[tuple[int, bool], list[Expression]] = {}
    for expression, length in zip(expressions, lengths, strict=True):
        groups.setdefault((length, expression.value), []).append(expression)
    rows: list[Row] = []
    for expression, length in zip(expressions, lengths, strict=True):
        others = groups.get((length, not expression.value))
        if others and len(rows) < size:
            clean, corrupted = (prompt.format(expression=e.text) for e in (expression, generator.choice(others)))
            rows.append(Row(clean, corrupted, f"{gap}{expression.value}", f"{gap}{not expression.value}"))
    return rows

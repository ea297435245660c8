"""Indirect object identification: "Then, Mary and John went to the store. John gave a ring to" -> " Mary".

Two names, one of which comes back; the answer is the other, the distractor the one that came back. The corrupted prompt
is the same sentence with three other names. Names are those that are a single token of the tokenizer.

Three forms (Wang et al. 2023):

- ``ioi``: the 30 templates of Edge Pruning, section 4.1, on the names of 2000; train 200 (400 and 100k with ``sizes``).
- ``ioi-t1``: the single template and the 99 names of ACDC, the indirect object first.
- ``ioi-extraction``: the single template and the 109 names of Garcia-Carrasco et al. 2024, appendix A, the subject
  first. Their patching set is the train split; they report on their validation set, here there is a test split too.

An unordered pair of names that a split has in a clean prompt is in no clean prompt of another split.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastcircuit.files import read_json
from fastcircuit.tasks.rows import Encoder, Row, draw, examples
from fastcircuit.tasks.task import Task

_DATA = Path(__file__).resolve().parent / "data"
_FEWEST_NAMES = 20  # so that every split has pairs of its own
# Of five unordered pairs of names, whose is which.
_OWNERS = ("train", "test", "validation", "test", "test")


def ioi(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """30 templates and every single-token name of the 2000 most frequent ones."""
    words, names = read_json(_DATA / "ioi.json", "ioi task"), read_json(_DATA / "names_2000.json", "names")
    templates = words["templates"] + [_object_first(template) for template in words["templates"]]
    return _build("ioi", templates, [*names["girls"], *names["boys"]], tokenizer, seed, sizes)


def ioi_t1(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """ACDC's template and names."""
    words = read_json(_DATA / "ioi.json", "ioi task")
    return _build("ioi-t1", [_object_first(words["templates"][0])], words["names_acdc"], tokenizer, seed, sizes)


def ioi_extraction(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """The template and names of the circuit extraction paper."""
    words = read_json(_DATA / "ioi.json", "ioi task")
    return _build("ioi-extraction", words["templates"][:1], words["names_extraction"], tokenizer, seed, sizes)


BUILDERS = {
    "ioi": (ioi, {"train": 200, "validation": 200, "test": 36084}),
    "ioi-t1": (ioi_t1, {"train": 50, "validation": 50, "test": 50}),
    "ioi-extraction": (ioi_extraction, {"train": 150, "validation": 150, "test": 150}),
}


def _object_first(template: str) -> str:
    return template.replace("{B} and {A}", "{A} and {B}", 1)


def _build(
    name: str, templates: Sequence[str], names: Sequence[str], tokenizer: Any, seed: int, sizes: Mapping[str, int]
) -> Task:
    words = read_json(_DATA / "ioi.json", "ioi task")
    nouns = {"PLACE": words["places"], "OBJECT": words["objects"]}
    encoder = Encoder(tokenizer, name)
    every = list(dict.fromkeys(names))
    fit = encoder.single_tokens(every, _FEWEST_NAMES, "names")
    generator = random.Random(f"{name} {seed}")
    generator.shuffle(fit)
    rows = draw(name, sizes, partial(_rows, templates, fit, nouns, generator))
    left_out = len(every) - len(fit)
    without = f", without {left_out} that are no single token" if left_out else ""
    about = f"Name the indirect object ({len(templates)} template(s), {len(fit)} names{without})."
    return Task(name, examples(encoder, rows), None, about)


def _rows(
    templates: Sequence[str],
    names: Sequence[str],
    nouns: Mapping[str, Sequence[str]],
    generator: random.Random,
    split: str,
) -> Iterator[Row]:
    """Random rows whose pair of names belongs to ``split``, without end."""
    while True:
        drawn = generator.sample(range(len(names)), 5)
        if _OWNERS[(drawn[0] + drawn[1]) % len(_OWNERS)] != split:
            continue
        answer, subject, *others = (names[i] for i in drawn)
        prompt = generator.choice(templates).removesuffix(" {A}")
        values = {slot: generator.choice(words) for slot, words in nouns.items()}
        yield Row(
            clean=prompt.format(A=answer, B=subject, **values),
            corrupted=_with_names(prompt, others).format(**values),
            answer=f" {answer}",
            distractor=f" {subject}",
        )


def _with_names(prompt: str, names: Sequence[str]) -> str:
    """``prompt`` with each of its three slots for names filled with a name of its own."""
    parts = prompt.replace("{A}", "{B}").split("{B}")
    return "".join(piece for pair in zip(parts, [*names, ""], strict=True) for piece in pair)

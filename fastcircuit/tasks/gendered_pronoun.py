"""Gendered pronoun: "So Evan is great with kids, isn't" -> " he".

Edge Pruning, section 4.1, after Athwin et al. 2023: 30 templates, the 2000 most frequent names of girls and boys of
2000; names of both are left out. The corrupted prompt has a name of the other list that takes as many tokens, and its
pronoun is the distractor. A name of one split is in no other, neither clean nor corrupted.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.files import read_json
from fastcircuit.tasks.rows import Encoder, Row, by_length, draw, examples
from fastcircuit.tasks.task import Task

NAME = "gendered-pronoun"
_DATA = Path(__file__).resolve().parent / "data"
_ANSWERS = {"girls": " she", "boys": " he"}
_OTHER = {"girls": "boys", "boys": "girls"}
# Whose is which of the names of one list and length, in turn: short lists go round too.
_OWNERS = ("train", "test", "validation", "test")


def build(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Half of each split's prompts with a name of either list."""
    lists = read_json(_DATA / "names_2000.json", "names")
    templates = read_json(_DATA / "gendered_pronoun.json", "gendered pronoun task")["templates"]
    encoder = Encoder(tokenizer, NAME)
    generator = random.Random(f"{NAME} {seed}")
    dealt = _deal(encoder, lists, generator)
    splits = draw(NAME, sizes, lambda split: _rows(templates, dealt[split], split, generator))
    count = sum(len(names) for groups in dealt.values() for names in groups.values())
    about = f"Say she or he by the name ({len(templates)} templates, {count} names)."
    return Task(NAME, examples(encoder, splits), None, about)


BUILDERS = {NAME: (build, {"train": 150, "validation": 150, "test": 378})}

Groups = Mapping[tuple[str, int], Sequence[str]]


def _deal(encoder: Encoder, lists: Mapping[str, Any], generator: random.Random) -> dict[str, Groups]:
    """For each split its own names, by list and number of tokens."""
    kinds = {kind: [name for name in lists[kind] if name not in lists[_OTHER[kind]]] for kind in _ANSWERS}
    dealt: dict[str, dict[tuple[str, int], list[str]]] = {split: defaultdict(list) for split in _OWNERS}
    for kind, names in kinds.items():
        for length, group in sorted(by_length(encoder.lengths(names, "So")).items()):
            generator.shuffle(group)
            for index, name in enumerate(group):
                dealt[_OWNERS[index % len(_OWNERS)]][kind, length].append(name)
    return {split: dict(groups) for split, groups in dealt.items()}


def _rows(templates: Sequence[str], groups: Groups, split: str, generator: random.Random) -> Iterator[Row]:
    """Random rows without end, a girl's name and a boy's name in turn."""
    usable: dict[str, list[tuple[str, Sequence[str]]]] = {
        kind: [
            (name, groups[_OTHER[kind], length])
            for (own, length), names in groups.items()
            if own == kind and (_OTHER[kind], length) in groups
            for name in names
        ]
        for kind in _ANSWERS
    }
    if not all(usable.values()):
        raise InputError(
            f"task {NAME}: no girl's and boy's name of the {split} split take as many tokens in this tokenizer"
        )
    while True:
        for kind, names in usable.items():
            template = generator.choice(templates)
            name, others = generator.choice(names)
            clean, corrupted = (template.format(name=n) for n in (name, generator.choice(others)))
            yield Row(clean, corrupted, _ANSWERS[kind], _ANSWERS[_OTHER[kind]])

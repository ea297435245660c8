"""Pronoun: say She or He by the name ("One day, Lily saw a big tree." -> " She").

Every prompt has one name. The corrupted prompt has a name of the other kind that takes as many tokens. The splits share
the sentences but never a name: a name of one split is in no other, neither clean nor corrupted.

``data/pronoun.json`` holds names and sentences and says how they were chosen.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError
from fastcircuit.files import read_json
from fastcircuit.tasks.spans import CLOSE, OPEN, Encoded, Marked, encode
from fastcircuit.tasks.task import Examples, Pair, Task

SIZES = {"train": 512, "validation": 192, "test": 384}
_DEAL = ("train", "test", "train", "validation", "train", "test", "train", "validation", "train", "test")
_DATA = Path(__file__).resolve().parent / "data" / "pronoun.json"


def build(tokenizer: Any, seed: int, sizes: Mapping[str, int]) -> Task:
    """Draw ``sizes[split]`` prompts (or as many as there are) for each split, half of them She, half He.

    Raises:
        InputError: the pronouns are no single tokens of this tokenizer, or no two names take as many of its tokens.
    """
    prompts = Prompts(tokenizer, read_json(_DATA, "pronoun task"))
    generator = random.Random(f"pronoun {seed}")
    dealt = prompts.deal_names(generator)
    splits = {}
    for split, size in sizes.items():
        she, he = (prompts.pairs(dealt[split], kind, generator, (size + 1) // 2) for kind in ("she", "he"))
        both = min(len(she), len(he))
        pairs = [pair for two in zip(she[:both], he[:both], strict=True) for pair in two]
        if not pairs:
            raise InputError(
                f"task pronoun: no She name and He name of the {split} split take as many tokens in this tokenizer, "
                f"such as {' and '.join(repr(dealt[split][kind][0]) for kind in ('she', 'he'))}; use another tokenizer"
            )
        splits[split] = Examples.from_pairs(pairs[:size])
    return Task("pronoun", splits, None, "Say She or He by the name.")


class Prompts:
    """The sentences with every name, tokenized when first asked for."""

    def __init__(self, tokenizer: Any, data: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.templates: list[str] = data["templates"]
        self.names: dict[str, list[str]] = data["names"]
        self.answers: dict[str, str] = data["answers"]
        self.kinds = {name: kind for kind, names in self.names.items() for name in names}
        self.encoded: dict[tuple[str, str], Encoded] = {}

    def encode(self, template: str, name: str) -> Encoded:
        """Token ids of one sentence and its pronoun, which must be a single token."""
        if (template, name) not in self.encoded:
            prompt, pronoun = template.format(n=name), self.answers[self.kinds[name]]
            where = f"task pronoun, {prompt!r}"
            encoded = encode(self.tokenizer, Marked.parse(f"{prompt} {OPEN}{pronoun}{CLOSE}", where), where)
            if len(encoded.answer(0)) != 1:
                raise InputError(
                    f"task pronoun: this tokenizer splits {pronoun!r} into {len(encoded.answer(0))} tokens; "
                    "it must be one, use a tokenizer that has it"
                )
            self.encoded[template, name] = encoded
        return self.encoded[template, name]

    def deal_names(self, generator: random.Random) -> dict[str, dict[str, list[str]]]:
        """Names by split and kind. Names of one kind and length are dealt together, so every split gets each length."""
        groups: dict[tuple[str, int], list[str]] = defaultdict(list)
        for name, kind in self.kinds.items():
            groups[kind, len(self.encode(self.templates[0], name).ids)].append(name)
        dealt: dict[str, dict[str, list[str]]] = {split: {"she": [], "he": []} for split in _DEAL}
        for (kind, _), names in sorted(groups.items()):
            generator.shuffle(names)
            for index, name in enumerate(names):
                dealt[_DEAL[index % len(_DEAL)]][kind].append(name)
        return dealt

    def pairs(self, names: Mapping[str, list[str]], kind: str, generator: random.Random, at_most: int) -> list[Pair]:
        """Pairs whose clean name is of ``kind``; sentences in which no other name aligns are passed over."""
        others = names["he" if kind == "she" else "she"]
        drawn = list(product(self.templates, names[kind]))
        generator.shuffle(drawn)
        pairs: list[Pair] = []
        for template, name in drawn:
            if len(pairs) == at_most:
                break
            clean = self.encode(template, name)
            aligned = [o for o in others if self.encode(template, o).spans == clean.spans]
            if aligned:
                pairs.append(_pair(clean, self.encode(template, generator.choice(aligned)), template, name))
        return pairs


def _pair(clean: Encoded, corrupted: Encoded, template: str, name: str) -> Pair:
    position = clean.spans[0][0] - 1
    return Pair(
        clean=clean.ids[: position + 1],
        corrupted=corrupted.ids[: position + 1],
        positions=(position,),
        answers=clean.answer(0),
        distractors=corrupted.answer(0),
        where=f"task pronoun, {template.format(n=name)!r}",
    )

"""Pronoun: aligned prompts, splits without common names, a model that reads every name; the 212 stored pairs."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from fastcircuit import tasks
from fastcircuit.errors import InputError
from fastcircuit.tasks import load_task

DATA = Path(__file__).parent / "data"
SHE, HE = 338, 346


@pytest.fixture(scope="module")
def task(stories):
    return load_task("pronoun", stories)


@pytest.fixture(scope="module")
def word_list():
    return json.loads((tasks._DATA / "pronoun.json").read_text(encoding="utf-8"))


def names_in(examples, tokenizer, templates):
    patterns = [re.compile(re.escape(t).replace(r"\{n\}", "(.+)") + "$") for t in templates]
    found = set()
    for rows in (examples.input_ids, examples.corrupted_input_ids):
        for ids, attended in zip(rows, examples.attention_mask, strict=True):
            text = tokenizer.decode(ids[attended], skip_special_tokens=True)
            matches = [m[1] for p in patterns if (m := p.match(text))]
            assert len(matches) == 1, text
            found.add(matches[0])
    return found


def test_sizes_and_balance(task):
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 512, "validation": 192, "test": 384}
    for split in task.splits.values():
        assert (split.answers == SHE).sum() == (split.answers == HE).sum() == len(split) / 2
        assert len({tuple(row) for row in split.input_ids.tolist()}) == len(split)


def test_no_name_is_in_two_splits(task, stories, word_list):
    used = [names_in(split, stories, word_list["templates"]) for split in task.splits.values()]
    assert sum(len(names) for names in used) == len(set.union(*used))
    assert set.union(*used) <= {name for kind in word_list["names"].values() for name in kind}


def test_the_answer_is_asked_at_the_last_token(task):
    for split in task.splits.values():
        last = split.attention_mask.sum(1) - 1
        assert torch.equal(split.answer_mask.int().argmax(1), last)
        assert (split.answer_mask.sum(1) == 1).all()
        answers, distractors = split.answers[split.answer_mask], split.distractors[split.answer_mask]
        assert torch.equal(answers + distractors, torch.full_like(answers, SHE + HE))
        assert (split.input_ids != split.corrupted_input_ids).any(1).all()


def test_the_model_reads_every_name(task, stories_model):
    for split in task.splits.values():
        row, last = torch.arange(len(split)), split.attention_mask.sum(1) - 1
        answers, distractors = split.answers[row, last], split.distractors[row, last]
        with torch.no_grad():
            clean = stories_model(split.input_ids).logits[row, last]
            corrupted = stories_model(split.corrupted_input_ids).logits[row, last]
        assert (clean[row, answers] > clean[row, distractors]).all()
        assert (corrupted[row, distractors] > corrupted[row, answers]).all()


def test_seeded(stories):
    small = {"train": 8, "validation": 4, "test": 3}
    a, b, c = (load_task("pronoun", stories, seed=seed, sizes=small) for seed in (3, 3, 4))
    assert torch.equal(a.split("test").input_ids, b.split("test").input_ids)
    assert not torch.equal(a.split("test").input_ids, c.split("test").input_ids)
    assert len(a.split("test")) == 3


def test_another_tokenizer(gpt2):
    task = load_task("pronoun", gpt2, sizes={"train": 40, "validation": 10, "test": 20})
    assert len(task.split("train")) == 40
    row = task.split("train").select([0])
    assert gpt2.decode(row.answers[row.answer_mask]) in (" She", " He")


def test_a_tokenizer_that_splits_the_pronoun_is_named(letters):
    with pytest.raises(InputError, match="cannot encode"):
        load_task("pronoun", letters)


def test_the_212_pairs_are_the_stored_ids(stories):
    task = load_task("pronoun-212", stories)
    stored = json.loads((DATA / "stories260K_pronoun_pairs.json").read_text())["prompts"]
    random.Random(0).shuffle(stored)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 150, "test": 62}
    for split, pairs in (("train", stored[:150]), ("test", stored[150:])):
        examples = task.split(split)
        for row, pair in enumerate(pairs):
            length = len(pair["clean_ids"])
            assert examples.input_ids[row][examples.attention_mask[row]].tolist() == pair["clean_ids"]
            assert examples.corrupted_input_ids[row, :length].tolist() == pair["corrupt_ids"]
            assert examples.answer_mask[row].nonzero().tolist() == [[length - 1]]
            assert examples.answers[row, length - 1] == pair["answer"]
            assert examples.distractors[row, length - 1] == pair["wrong"]

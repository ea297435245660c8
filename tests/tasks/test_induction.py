"""Induction: strings as the model was trained on, a corruption that moves the pattern, a model that does it."""

import random
from collections import Counter

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.tasks import induction, load_task

# First repeated letter in the 32,000 strings of makemore's induction.txt (index 1..15).
PUBLISHED = [1197, 2332, 3336, 3858, 4113, 3961, 3551, 2967, 2252, 1720, 1147, 685, 417, 240, 123]


@pytest.fixture(scope="module")
def task(letters):
    return load_task("induction", letters)


def first_repetition(text):
    return next(i for i, letter in enumerate(text) if letter in text[:i])


def test_strings_are_distributed_as_published():
    generator = random.Random(0)
    drawn = [induction.generate(generator) for _ in range(8000)]
    onsets = Counter(onset for _, _, onset in drawn)
    published = PUBLISHED[1:]  # one-letter strings are left out
    for onset, count in enumerate(published, start=2):
        expected = 8000 * count / (32000 - PUBLISHED[0])
        assert abs(onsets[onset] - expected) < 5 * (2 * expected) ** 0.5 + 3
    periods = Counter(onset - clean.index(clean[onset]) for clean, _, onset in drawn if onset == 4)
    assert max(periods.values()) < 1.3 * min(periods.values())


def test_corrupted_repeats_at_the_same_place_with_another_period():
    generator = random.Random(1)
    for _ in range(500):
        clean, corrupted, onset = induction.generate(generator)
        assert len(clean) == len(corrupted) == 31
        assert first_repetition(clean) == first_repetition(corrupted) == onset
        assert clean.index(clean[onset]) != corrupted.index(corrupted[onset])
        assert all(a != b for a, b in zip(clean, corrupted, strict=True))


def test_answers_are_the_predictable_letters(task, letters):
    examples = task.split("test")
    for row in range(50):
        ids, asked = examples.input_ids[row], examples.answer_mask[row]
        assert ids[0] == 0
        text = letters.decode(ids, skip_special_tokens=True)
        onset = first_repetition(text)
        assert asked.nonzero().flatten().tolist() == list(range(onset + 1, 31))
        follows = {int(a): int(b) for a, b in zip(ids[1:-1].flip(0), ids[2:].flip(0), strict=True)}
        assert all(follows[int(ids[i])] == examples.answers[row, i] for i in range(onset + 1, 31))
        there = examples.corrupted_input_ids[row]
        assert torch.equal(examples.distractors[row, onset + 1 : 30], there[onset + 2 :])
        assert (examples.distractors[row][asked] != examples.answers[row][asked]).all()


def test_splits_share_no_string(task):
    rows = [tuple(row) for split in task.splits.values() for row in split.input_ids.tolist()]
    assert len(set(rows)) == len(rows) == 1024 + 256 + 512


def test_seeded(letters, task):
    small = {"train": 20, "validation": 5, "test": 5}
    a, b, c = (load_task("induction", letters, seed=seed, sizes=small) for seed in (3, 3, 4))
    assert torch.equal(a.split("train").input_ids, b.split("train").input_ids)
    assert not torch.equal(a.split("train").input_ids, c.split("train").input_ids)


def test_the_model_does_it_and_the_corrupted_run_answers_otherwise(task, induction_model):
    examples = task.split("test")
    asked = examples.answer_mask
    with torch.no_grad():
        clean = induction_model(examples.input_ids).logits[asked].argmax(-1)
        corrupted = induction_model(examples.corrupted_input_ids).logits[asked].argmax(-1)
    assert (clean == examples.answers[asked]).float().mean() > 0.998
    assert (corrupted == examples.distractors[asked]).float().mean() > 0.998
    assert not (corrupted == examples.answers[asked]).any()


@pytest.mark.parametrize("tokenizer", ["stories", "gpt2"])
def test_other_tokenizers_fail_clearly(tokenizer, request):
    with pytest.raises(InputError, match="one token per letter"):
        load_task("induction", request.getfixturevalue(tokenizer))

"""Pair, Examples, Task and load_task: shapes, padding, selection, errors."""

import re

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.tasks import Examples, Pair, Task, load_task, names

SHORT = Pair((1, 5), (1, 6), (1,), (7,), (8,), "row 1")
LONG = Pair((1, 2, 3, 4), (1, 2, 9, 4), (1, 3), (3, 10), (-100, 11), "row 2")


def test_from_pairs_pads_right():
    examples = Examples.from_pairs([SHORT, LONG])
    assert len(examples) == 2
    assert examples.input_ids.tolist() == [[1, 5, 0, 0], [1, 2, 3, 4]]
    assert examples.corrupted_input_ids.tolist() == [[1, 6, 0, 0], [1, 2, 9, 4]]
    assert examples.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert examples.answer_mask.tolist() == [[False, True, False, False], [False, True, False, True]]
    assert examples.answers.tolist() == [[-100, 7, -100, -100], [-100, 3, -100, 10]]
    assert examples.distractors.tolist() == [[-100, 8, -100, -100], [-100, -100, -100, 11]]
    assert examples.input_ids.dtype == examples.answers.dtype == torch.int64
    assert examples.attention_mask.dtype == examples.answer_mask.dtype == torch.bool


@pytest.mark.parametrize("rows", [[0], slice(0, 1), torch.tensor([0]), torch.tensor([True, False])])
def test_select_trims_to_the_longest_row(rows):
    picked = Examples.from_pairs([SHORT, LONG]).select(rows)
    assert picked.input_ids.tolist() == [[1, 5]]
    assert picked.answers.tolist() == [[-100, 7]]


def test_select_keeps_order_repeats_and_nothing():
    examples = Examples.from_pairs([SHORT, LONG])
    assert examples.select([1, 0, 1]).input_ids[:, 0].tolist() == [1, 1, 1]
    assert examples.select([1, 0, 1]).input_ids.shape == (3, 4)
    assert len(examples.select([])) == 0


def test_both_directions_exchange_prompts_and_answers():
    both = Examples.from_pairs([SHORT, LONG]).both_directions()
    assert both.input_ids.tolist() == [[1, 5, 0, 0], [1, 6, 0, 0], [1, 2, 3, 4], [1, 2, 9, 4]]
    assert both.corrupted_input_ids.tolist() == [[1, 6, 0, 0], [1, 5, 0, 0], [1, 2, 9, 4], [1, 2, 3, 4]]
    assert both.answers[:2].tolist() == [[-100, 7, -100, -100], [-100, 8, -100, -100]]
    assert both.distractors[:2].tolist() == [[-100, 8, -100, -100], [-100, 7, -100, -100]]
    assert both.answer_mask.sum(1).tolist() == [1, 1, 2, 2]


def test_concat_pads_to_the_widest():
    both = Examples.concat([Examples.from_pairs([SHORT]), Examples.from_pairs([LONG])])
    whole = Examples.from_pairs([SHORT, LONG])
    assert all(torch.equal(a, b) for a, b in zip(vars(both).values(), vars(whole).values(), strict=True))
    with pytest.raises(InputError, match="nothing to concatenate"):
        Examples.concat([])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair((1, 2), (1, 2, 3), (1,), (4,), (5,), "row 9"), "row 9: the clean prompt has 2 tokens .* corrupted one 3"),
        (Pair((1, 2), (1, 3), (), (), (), "row 9"), "row 9: there is no answer"),
        (Pair((1, 2), (1, 3), (1,), (4, 5), (5,), "row 9"), "row 9: 1 positions, 2 answers"),
        (Pair((1, 2), (1, 3), (2,), (4,), (5,), "row 9"), r"row 9: answer positions \[2\] must ascend within 0..1"),
        (Pair((1, 2), (1, 3), (1, 0), (4, 4), (5, 5), "row 9"), r"row 9: answer positions \[1, 0\]"),
        (Pair((1, 2), (1, 3), (1,), (-1,), (5,), "row 9"), "row 9: -1 is not a token id"),
        (Pair((1, 2), (1, 3), (1,), (12,), (5,), "row 9"), "row 9: token id 12 is outside the vocabulary of 12"),
    ],
)
def test_wrong_pairs(pair, message):
    with pytest.raises(InputError, match=message):
        Examples.from_pairs([SHORT, pair], vocab_size=12)


def test_empty_split():
    with pytest.raises(InputError, match="the test split is empty"):
        Examples.from_pairs([], name="the test split")


def test_task_names_its_splits_and_checks_the_vocabulary():
    task = Task("toy", {"train": Examples.from_pairs([SHORT, LONG])}, None, "A toy.")
    assert len(task.split("train")) == 2
    with pytest.raises(InputError, match="task toy has no split 'test'; it has: train"):
        task.split("test")
    task.check_vocabulary(12)
    with pytest.raises(InputError, match="task toy, train pair 2: token id 11 is outside the vocabulary of 11"):
        task.check_vocabulary(11)


def test_unknown_task_lists_the_known(letters):
    with pytest.raises(InputError, match=re.escape(f"no task and no file 'nosuch'; tasks: {', '.join(names())};")):
        load_task("nosuch", letters)
    papers = {"ioi", "ioi-t1", "greater-than", "gendered-pronoun", "boolean-instruction", "boolean-few-shot"}
    papers |= {"acronyms", "docstring", "ioi-extraction", "greater-than-extraction"}
    assert papers | {"induction", "pronoun", "pronoun-212", "tracr-reverse", "tracr-xproportion"} <= set(names())


@pytest.mark.parametrize("sizes", [{"dev": 3}, {"train": 0}, {"train": 2.5}])
def test_wrong_sizes(letters, sizes):
    with pytest.raises(InputError, match="sizes"):
        load_task("induction", letters, sizes=sizes)

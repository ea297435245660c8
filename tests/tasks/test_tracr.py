"""The input spaces of Tracr's programs."""

import pytest

from fastcircuit.errors import InputError
from fastcircuit.models.loading import load_tokenizer
from fastcircuit.tasks import load_task
from fastcircuit.tasks.task import NOTHING

SIZES = {"tracr-reverse": (27, 3 + 9 + 81 + 243), "tracr-xproportion": (256, 4 + 16 + 64 + 1024)}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


def test_splits_hold_every_list_once_and_no_length_in_common(name):
    task = load_task(name, load_tokenizer(name))
    lengths = {}
    for split, size in zip(("train", "test"), SIZES[name], strict=True):
        examples = task.split(split)
        assert len(examples) == size
        assert (
            len({tuple(row) for row in examples.input_ids.masked_fill(~examples.attention_mask, -1).tolist()}) == size
        )
        lengths[split] = set(examples.attention_mask.sum(1).tolist())
        differs = (examples.input_ids != examples.corrupted_input_ids) & examples.attention_mask
        assert differs.any(1).all()
        assert not differs[:, 0].any()
        asked = examples.attention_mask.clone()
        if name == "tracr-reverse":
            asked[:, 0] = False
        assert (examples.answer_mask == asked).all()
        assert (examples.answers != examples.distractors)[asked].all()
    assert not lengths["train"] & lengths["test"]


@pytest.mark.parametrize(
    ("name", "list_", "answers"),
    [("tracr-reverse", "1 3 3", "3 3 1"), ("tracr-xproportion", "x a x b", "0 1 1/2 2/3 1/2")],
)
def test_answers_are_the_programs(name, list_, answers):
    tokenizer = load_tokenizer(name)
    examples = load_task(name, tokenizer).split("train")
    row = examples.input_ids.tolist().index(tokenizer(list_)["input_ids"])
    found = [token for token in examples.answers[row].tolist() if token != NOTHING]
    assert tokenizer.convert_ids_to_tokens(found) == answers.split()


def test_a_seed_draws_the_same_lists_again_and_another_seed_others(name):
    tokenizer = load_tokenizer(name)
    first, again, other = (
        load_task(name, tokenizer, seed=seed, sizes={"train": 9}).split("train") for seed in (1, 1, 2)
    )
    assert len(first) == 9
    assert first.input_ids.equal(again.input_ids)
    assert first.corrupted_input_ids.equal(again.corrupted_input_ids)
    assert not first.input_ids.equal(other.input_ids)


def test_what_does_not_fit_is_named(name):
    with pytest.raises(InputError, match=f"task {name}: the tokenizer has no token"):
        load_task(name, load_tokenizer("induction-gpt2"))
    with pytest.raises(InputError, match="has no split 'validation'; it has: train, test"):
        load_task(name, load_tokenizer(name), sizes={"validation": 3})

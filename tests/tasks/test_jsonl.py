"""JSONL files of pairs: splits, encodings, and one clear line for whatever is wrong."""

import json

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.tasks import load_task

GOOD = {"clean": "Mary was sad.<predict> She</predict>", "corrupted": "Tom was sad.<predict> He</predict>"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.jsonl"


def test_dealt_splits_are_seeded_60_20_20(file, gpt2):
    words = "cat dog man boy girl house tree car book day"
    rows = [{"clean": f"The {w} sat.<predict> He</predict>", "corrupted": "The one sat."} for w in words.split()]
    write(file, rows)
    task = load_task(file, gpt2)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 6, "validation": 2, "test": 2}
    assert len({tuple(row) for split in task.splits.values() for row in split.input_ids.tolist()}) == 10
    again, other = load_task(str(file), gpt2), load_task(file, gpt2, seed=1)
    assert torch.equal(task.split("train").input_ids, again.split("train").input_ids)
    assert not torch.equal(task.split("train").input_ids, other.split("train").input_ids)
    assert task.name == "pairs"
    assert len(load_task(file, gpt2, sizes={"train": 3}).split("train")) == 3


def test_three_rows_are_the_fewest_to_deal(file, gpt2):
    assert [len(s) for s in load_task(write(file, [GOOD] * 3), gpt2).splits.values()] == [1, 1, 1]
    with pytest.raises(InputError, match=r"pairs.jsonl has 2 pair\(s\), too few to deal"):
        load_task(write(file, [GOOD] * 2), gpt2)


def test_given_splits(file, gpt2):
    task = load_task(write(file, [GOOD | {"split": s} for s in ("test", "train", "test")]), gpt2)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 1, "test": 2}
    with pytest.raises(InputError, match="no split 'validation'; it has: train, test"):
        task.split("validation")


def test_bom_crlf_blank_lines_and_no_final_newline(file, gpt2):
    line = json.dumps(GOOD | {"split": "train"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert len(load_task(file, gpt2).split("train")) == 2


def test_distractor_as_text_or_list(file, gpt2):
    rows = [GOOD | {"distractor": d, "split": "train"} for d in ("They", ["They"])]
    examples = load_task(write(file, rows), gpt2).split("train")
    assert gpt2.decode(examples.distractors[examples.answer_mask]) == " They They"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2: a list, not an object"),
        ({"clean": GOOD["clean"]}, 'line 2: "corrupted" is missing'),
        (GOOD | {"clean": 3}, 'line 2: "clean" is a number; give a text'),
        (GOOD | {"corrupted": None}, 'line 2: "corrupted" is null; give a text'),
        (GOOD | {"split": "dev"}, "line 2: \"split\" is 'dev'; accepted: train, validation, test"),
        (GOOD | {"split": ["train"]}, 'line 2: "split" is'),
        (GOOD | {"split": None}, 'line 2: "split" is None'),
        (GOOD | {"distractor": 3}, 'line 2: "distractor" is a number'),
        (GOOD | {"distractor": [3]}, 'line 2: "distractor" is a list'),
        (GOOD | {"answer": "x"}, "line 2: unknown key 'answer'; known: clean, corrupted, distractor, split"),
        (GOOD, 'line 2: "split" is missing though other lines have it'),
        (GOOD | {"clean": "Mary", "split": "test"}, 'line 2: "clean" has no <predict>'),
        (GOOD | {"corrupted": "Tom was not sad.", "split": "test"}, "line 2: the clean prompt has [0-9]+ tokens"),
    ],
)
def test_wrong_rows(file, gpt2, row, message):
    write(file, [GOOD | {"split": "train"}, row])
    with pytest.raises(InputError, match=message) as caught:
        load_task(file, gpt2)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n \n", "is empty"),
        (b'\n{"clean": ', "line 2: not valid JSON"),
        (b'{"clean": "caf\xe9"}', "line 1: not UTF-8"),
        ('{"clean": "x"}'.encode("utf-16"), "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b'{"clean": "a\\ud800<predict> b</predict>", "corrupted": "c"}', "line 1: the tokenizer cannot encode"),
    ],
)
def test_wrong_files(file, gpt2, raw, message):
    file.write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        load_task(file, gpt2)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, gpt2):
    with pytest.raises(InputError, match="no task and no file"):
        load_task(tmp_path / "nosuch.jsonl", gpt2)
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        load_task(tmp_path, gpt2)

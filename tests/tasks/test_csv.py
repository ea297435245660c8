"""CSV files of pairs: EAP-IG's as they are (MIT, Copyright (c) 2025 Michael Hanna), spans, and whatever is wrong."""

import csv
import lzma
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastcircuit.errors import InputError
from fastcircuit.tasks import load_task

DATA = Path(__file__).parent / "data"
YEARS = "clean,corrupted,label\n"
TOKENS = ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
SPANS = "clean,corrupted,distractor,split\n"
GOOD = "The war lasted from 1352 to 13,The war lasted from 1301 to 13,52\n"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.csv"


def unpack(name, path):
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_greater_than_of_eap_ig(file, gpt2):
    rows = unpack("eap_ig_greater_than_data.csv", file)
    task = load_task(file, gpt2)
    assert {split: len(examples) for split, examples in task.splits.items()} == {
        "train": 600,
        "validation": 200,
        "test": 200,
    }
    assert task.ordered
    assert [gpt2.decode([token]) for token in task.answer_tokens] == [f"{number:02d}" for number in range(100)]
    there = {(row["clean"], row["corrupted"], f"{int(row['label']):02d}") for row in rows}
    found = set()
    for examples in task.splits.values():
        for row in range(len(examples)):
            asked = examples.answer_mask[row]
            year = gpt2.decode(examples.distractors[row][asked])
            found.add((gpt2.decode(examples.input_ids[row]), gpt2.decode(examples.corrupted_input_ids[row]), year))
            right = task.right_answers(examples.answers[row][asked], examples.distractors[row][asked])
            assert right.sum() == 99 - int(year)
    assert found == there


def test_ioi_of_eap_ig_has_token_ids_of_its_tokenizer(file, gpt2):
    rows = unpack("eap_ig_ioi_llama.csv", file)
    named = {}
    for row in rows:
        names = re.findall(r"\b[A-Z]\w+", row["clean"])
        (answer,) = [name for name in names[-3:] if names.count(name) == 1]
        for name, column in ((answer, "correct_idx"), (names[-1], "incorrect_idx")):
            assert named.setdefault(name, int(row[column])) == int(row[column])
    vocabulary = {f"<{i}>": i for i in range(128256) if i not in named.values()} | named
    words = sorted({word for row in rows for word in re.findall(r"\w+|[.,]", row["clean"] + row["corrupted"])})
    for index, word in enumerate(word for word in words if word not in vocabulary):
        vocabulary[word] = vocabulary.pop(f"<{index}>")
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="<127000>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    llama = PreTrainedTokenizerFast(tokenizer_object=level)
    task = load_task(file, llama)
    assert sum(map(len, task.splits.values())) == 499
    examples = task.split("train")
    for row in range(len(examples)):
        asked = examples.answer_mask[row]
        answer, distractor = (llama.decode(t[row][asked]) for t in (examples.answers, examples.distractors))
        words = llama.decode(examples.input_ids[row]).split()
        assert (words.count(answer), words.count(distractor)) == (1, 2)
    with pytest.raises(InputError, match=r"line 4, \"correct_idx\": token id 86753 is outside the vocabulary of 50257"):
        load_task(file, gpt2)


def test_spans_are_those_of_a_jsonl_file(file, gpt2):
    rows = ['"Mary was sad.<predict> She</predict>","Tom was sad.<predict> He</predict>",,train']
    rows += ['"Mary, then.<predict> She</predict>","Tom, then.",They,test']
    file.write_bytes(b"\xef\xbb\xbf" + (SPANS + "\n\n".join(rows)).replace("\n", "\r\n").encode())
    task = load_task(str(file), gpt2)
    words = {
        split: [gpt2.decode(t[e.answer_mask]) for t in (e.answers, e.distractors)] for split, e in task.splits.items()
    }
    assert words == {"train": [" She", " He"], "test": [" She", " They"]}
    assert gpt2.decode(task.split("test").input_ids[0]) == "Mary, then."
    assert task.answer_tokens is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YEARS + GOOD + GOOD + GOOD, None),
        (YEARS + GOOD + "The war,The war\n", "line 3: 2 cells under a header of 3"),
        (YEARS + GOOD + "\n" + GOOD.replace(",52", ",x"), "line 4: \"label\" is 'x'; give a number"),
        (YEARS + GOOD.replace(",52", ",-1"), "line 2: \"label\" is '-1'"),
        (YEARS + GOOD.replace(",52", ",99"), 'line 2: "label" is 99; give the two digits'),
        (YEARS + GOOD.replace(",52", ",53"), 'line 2: "label" is 53 and no year'),
        (
            YEARS + GOOD.replace("1301", "1301 or 02") + GOOD * 2,
            "line 2: the clean prompt has 8 tokens and the corrupted one 10",
        ),
        (TOKENS + "0,a b,a c,a d,5,50257\n", 'line 2, "incorrect_idx": token id 50257 is outside the vocabulary'),
        (SPANS + '"Mary\nwas",x,,\n', 'line 2: "clean" has no <predict>'),
        (SPANS + '"a.\n<predict> b</predict>",x,,\na,b,,dev\n', "line 2: "),
        (SPANS + 'a"b"<predict> c</predict>,"b" c,,dev\n', "line 2: not valid CSV"),
        (SPANS + "a<predict> b</predict>,c,,dev\n", "line 2: \"split\" is 'dev'; accepted: train, validation, test"),
        ("question,answer\nx,y\n", "line 1: its columns are 'question,answer'; accepted: clean,corrupted,label; "),
        ("clean,corrupted,clean\n", "line 1: its columns are"),
        (YEARS, "has a header and no rows"),
        ("\n\n", "is empty; give a header"),
        ("clean,corrupted\ncaf\udce9,b\n", "line 2: not UTF-8"),
        (YEARS + GOOD, r"has 1 pair\(s\), too few to deal"),
    ],
)
def test_wrong_files_name_the_line(file, gpt2, text, message):
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    if message is None:
        assert len(load_task(file, gpt2).split("test")) == 1
        return
    with pytest.raises(InputError, match=message) as caught:
        load_task(file, gpt2)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_two_digit_tokens(file, stories):
    file.write_text(YEARS + GOOD * 3)
    with pytest.raises(InputError, match=r"00\.\.99 are a token each"):
        load_task(file, stories)


def test_splits_are_seeded(file, gpt2):
    unpack("eap_ig_greater_than_data.csv", file)
    a, b, c = (load_task(file, gpt2, seed=seed, sizes={"train": 7}).split("train").input_ids for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(a) == 7

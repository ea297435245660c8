"""The papers' tasks under GPT-2's tokenizer, one cut like Llama's, and ones they do not fit."""

import ast
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from fastcircuit import tasks
from fastcircuit.errors import InputError
from fastcircuit.tasks import load_task

SMALL = {"train": 40, "validation": 20, "test": 60}
SIZES = {  # Edge Pruning section 4.1 and 5; Garcia-Carrasco et al. (250 and 250, IOI 150 and 150); ACDC's docstring
    "ioi": (200, 200, 36084),
    "ioi-t1": (50, 50, 50),
    "ioi-extraction": (150, 150, 150),
    "greater-than": (150, 150, 12240),
    "greater-than-extraction": (250, 250, 250),
    "gendered-pronoun": (150, 150, 378),
    "boolean-instruction": (3840, 767, 3070),
    "boolean-few-shot": (3840, 767, 3070),
    "acronyms": (250, 250, 250),
    "docstring": (50, 50, 50),
}
YEARS = ("greater-than", "greater-than-extraction")
WITH_BEGIN = ("acronyms", "docstring")


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer cut as Llama's is: "\u2581" for a space, one in front, digits apart, a begin and an end token."""
    files = ("ioi", "docstring", "names_2000", "gendered_pronoun", "acronyms")
    words = {word for file in files for word in re.findall(r"[A-Za-z]+", (tasks._DATA / f"{file}.json").read_text())}
    words |= {"True", "False", "and", "or", "not", "is", "she", "he"}
    characters = [chr(code) for code in (10, *range(33, 127), 0x2581)]
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>"], 0.0) | dict.fromkeys(characters, -10.0)
    pieces |= dict.fromkeys(sorted(f"\u2581{word}" for word in words), -1.0) | {"True": -2.0, "False": -2.0}
    unigram = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    unigram.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    unigram.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def texts(examples, tokenizer):
    """(clean, corrupted, answer, distractor) of every row, special tokens left out."""
    for row in range(len(examples)):
        attended, asked = examples.attention_mask[row], examples.answer_mask[row]
        prompts = [ids[row][attended] for ids in (examples.input_ids, examples.corrupted_input_ids)]
        words = [t[row][asked] for t in (examples.answers, examples.distractors)]
        yield tuple(tokenizer.decode(ids, skip_special_tokens=True).strip(" ") for ids in (*prompts, *words))


def rows_of(task, tokenizer):
    return [row for split in task.splits.values() for row in texts(split, tokenizer)]


def test_sizes_are_the_papers():
    for name, sizes in SIZES.items():
        assert tuple(tasks._BUILDERS[name][1].values()) == sizes, name


def test_ioi_in_full(gpt2):
    task = load_task("ioi", gpt2)
    assert {split: len(examples) for split, examples in task.splits.items()} == dict(
        zip(("train", "validation", "test"), SIZES["ioi"], strict=True)
    )
    rows = [tuple(row) for split in task.splits.values() for row in split.input_ids.tolist()]
    assert len(set(rows)) == len(rows)
    assert "812 names, without 1116 that are no single token" in task.description
    assert len(load_task("ioi", gpt2, sizes={"train": 400, "test": 1}).split("train")) == 400


@pytest.mark.parametrize("name", [name for name in SIZES if name != "ioi"])
def test_full_sizes(name, gpt2):
    task = load_task(name, gpt2)
    assert tuple(len(task.split(split)) for split in ("train", "validation", "test")) == SIZES[name]


def test_ioi_with_many_examples(gpt2):
    assert len(load_task("ioi", gpt2, sizes={"train": 10_000, "test": 1}).split("train")) == 10_000


def test_templates_and_nouns_are_the_papers(gpt2):
    """30, 5 and 30 templates, 120 nouns; as many are drawn from in prompts."""
    shapes = {"ioi": set(), "greater-than": set(), "gendered-pronoun": set()}
    nouns = set(json.loads((tasks._DATA / "greater_than.json").read_text())["nouns"])
    seen = set()
    for clean, *_ in rows_of(load_task("greater-than", gpt2, sizes={**SMALL, "test": 1500}), gpt2):
        (noun,) = [noun for noun in nouns if re.search(rf"\b{noun}\b", clean)]
        seen.add(noun)
        shapes["greater-than"].add(re.sub(r"\d+", "0", re.sub(rf"\b{noun}\b", "_", clean)))
    assert seen == nouns
    assert len(nouns) == 120
    words = json.loads((tasks._DATA / "ioi.json").read_text())
    fill = "|".join(map(re.escape, [*words["places"], *words["objects"]]))
    for clean, _, answer, distractor in rows_of(load_task("ioi", gpt2, sizes={**SMALL, "test": 600}), gpt2):
        named = re.sub(rf"\b{answer}\b", "A", re.sub(rf"\b{distractor}\b", "B", clean))
        shapes["ioi"].add(re.sub(rf"\b({fill})\b", "_", named))
    for clean, *_ in rows_of(load_task("gendered-pronoun", gpt2), gpt2):
        shapes["gendered-pronoun"].add(clean.replace(clean.split()[1], "_"))
    assert {name: len(found) for name, found in shapes.items()} == {
        "ioi": 30,
        "greater-than": 5,
        "gendered-pronoun": 30,
    }


@pytest.mark.parametrize("name", SIZES)
def test_what_makes_a_task_valid(name, gpt2):
    task = load_task(name, gpt2, sizes=SMALL)
    every = []
    for split, examples in task.splits.items():
        assert len(examples) == SMALL[split]
        last = examples.attention_mask.sum(1) - 1
        assert torch.equal(examples.answer_mask.int().argmax(1), last)
        assert (examples.answer_mask.sum(1) == 1).all()
        asked = examples.answer_mask
        assert (examples.answers[asked] != examples.distractors[asked]).all()
        assert (examples.input_ids != examples.corrupted_input_ids).any(1).all()
        assert ((examples.input_ids[:, 0] == gpt2.bos_token_id) == (name in WITH_BEGIN)).all()
        every += [tuple(row) for row in examples.input_ids.tolist()]
    assert len(set(every)) == len(every)
    same, other = (load_task(name, gpt2, seed=seed, sizes=SMALL) for seed in (0, 1))
    assert all(torch.equal(task.splits[s].corrupted_input_ids, same.splits[s].corrupted_input_ids) for s in SMALL)
    assert task.splits["train"].input_ids.tolist() != other.splits["train"].input_ids.tolist()


@pytest.mark.parametrize("name", ["ioi", "ioi-t1", "ioi-extraction"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "metaspace"])
def test_ioi_asks_for_the_name_that_came_once(name, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    words = json.loads((tasks._DATA / "ioi.json").read_text())
    names = set(words["names_acdc"] + words["names_extraction"])
    if name == "ioi":
        lists = json.loads((tasks._DATA / "names_2000.json").read_text())
        names = {*lists["girls"], *lists["boys"]}
    task = load_task(name, tokenizer, sizes=SMALL)
    pairs = []
    for examples in task.splits.values():
        own = set()
        for clean, corrupted, answer, distractor in texts(examples, tokenizer):
            seen, others = ([w for w in re.findall(r"\w+", text) if w in names] for text in (clean, corrupted))
            assert sorted(seen) == sorted([answer, distractor, distractor])
            assert len(set(others)) == 3
            assert not {answer, distractor} & set(others)
            blanked = [re.sub("|".join(rf"\b{n}\b" for n in seen + others), "_", text) for text in (clean, corrupted)]
            assert blanked[0] == blanked[1]
            own.add(frozenset((answer, distractor)))
        pairs.append(own)
    assert sum(map(len, pairs)) == len(set.union(*pairs))


def test_ioi_forms(gpt2):
    (clean, *_), *_ = rows_of(load_task("ioi-t1", gpt2, sizes=SMALL), gpt2)
    assert re.fullmatch(r"Then, (\w+) and (\w+) went to the \w+. \2 gave a \w+ to", clean)
    (clean, *_), *_ = rows_of(load_task("ioi-extraction", gpt2, sizes=SMALL), gpt2)
    assert re.fullmatch(r"Then, (\w+) and (\w+) went to the \w+. \1 gave a \w+ to", clean)
    shapes = {re.sub(r" [A-Z]\w+", "", row[0])[:9] for row in rows_of(load_task("ioi", gpt2, sizes=SMALL), gpt2)}
    assert len(shapes) > 5


@pytest.mark.parametrize("name", YEARS)
def test_greater_than_is_ordered(name, gpt2):
    task = load_task(name, gpt2, sizes=SMALL)
    assert [gpt2.decode([token]) for token in task.answer_tokens] == [f"{number:02d}" for number in range(100)]
    assert task.ordered
    for examples in task.splits.values():
        asked = examples.answer_mask
        right = task.right_answers(examples.answers[asked], examples.distractors[asked])
        for row, (clean, corrupted, answer, distractor) in enumerate(texts(examples, gpt2)):
            year, century = re.search(r"(\d{4}) to (\d\d)$", clean).groups()
            assert year[:2] == century
            assert int(answer) == int(distractor) + 1 == int(year[2:]) + 1
            assert [i for i in range(100) if right[row, i]] == list(range(int(year[2:]) + 1, 100))
            other = re.search(r"(\d{4}) to", corrupted)[1]
            assert other != year
            assert 1100 <= int(year) <= (2199 if name == "greater-than" else 1799)
            if name == "greater-than-extraction":
                assert other == century + "01"
                assert corrupted.replace(other, year) == clean


def test_gendered_pronoun_says_it_by_the_name(gpt2):
    lists = json.loads((tasks._DATA / "names_2000.json").read_text())
    pronoun = dict.fromkeys(lists["girls"], "she") | dict.fromkeys(lists["boys"], "he")
    used = []
    task = load_task("gendered-pronoun", gpt2)
    for examples in task.splits.values():
        names = set()
        for clean, corrupted, answer, distractor in texts(examples, gpt2):
            name, other = (text.split()[1] for text in (clean, corrupted))
            assert (pronoun[name], pronoun[other]) == (answer, distractor)
            assert clean.replace(name, other) == corrupted
            names |= {name, other}
        used.append(names)
        assert abs(sum(row[2] == "she" for row in texts(examples, gpt2)) - len(examples) / 2) <= 1
    assert sum(map(len, used)) == len(set.union(*used))


def nesting(node):
    """How deep and/or nest in a parsed expression, and its longest run of nots."""
    if isinstance(node, ast.Constant):
        return 0, 0
    if isinstance(node, ast.UnaryOp):
        depth, run = nesting(node.operand)
        inner = node.operand
        while isinstance(inner, ast.UnaryOp):
            inner = inner.operand
        return depth, max(run, ast.unparse(node).split(ast.unparse(inner))[0].count("not"))
    depths, runs = zip(*map(nesting, node.values), strict=True)
    return 1 + max(depths), max(runs)


@pytest.mark.parametrize("name", ["boolean-instruction", "boolean-few-shot"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "metaspace"])
def test_boolean_expressions_and_their_partners(name, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    found = set()
    for clean, corrupted, answer, distractor in rows_of(load_task(name, tokenizer, sizes=SMALL), tokenizer):
        for text, value in ((clean, answer), (corrupted, distractor)):
            expression = text.split("\n")[-1].removesuffix(" [/INST] '").removesuffix(" is")
            assert re.fullmatch(r"(True|False|and|or|not|[() ])+", expression)
            parsed = ast.parse(expression, mode="eval").body
            assert str(eval(expression)) == value
            literals = len(re.findall("True|False", expression))
            depth, nots = nesting(parsed)
            assert 3 <= literals <= 6
            assert depth <= 3
            assert nots <= 2
            found.add((literals, depth, nots))
    assert {f[0] for f in found} == {3, 4, 5, 6}
    assert {f[1] for f in found} >= {2, 3}
    assert {f[2] for f in found} == {0, 1, 2}


@pytest.mark.parametrize("tokenizer", ["gpt2", "metaspace"])
def test_acronyms_are_the_initials(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    task = load_task("acronyms", tokenizer, sizes=SMALL)
    for *prompts, answer, distractor in rows_of(task, tokenizer):
        for text, letter in zip(prompts, (answer, distractor), strict=True):
            *words, letters = re.fullmatch(r"The ([A-Z][a-z]+) ([A-Z][a-z]+) ([A-Z][a-z]+) \(([A-Z]{2})", text).groups()
            assert letters + letter == "".join(word[0] for word in words)
    assert len({examples.input_ids.shape[1] for examples in task.splits.values()}) == 1
    assert all(examples.attention_mask.all() for examples in task.splits.values())


@pytest.mark.parametrize("tokenizer", ["gpt2", "metaspace"])
def test_docstring_asks_for_the_next_argument(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    for clean, corrupted, answer, distractor in rows_of(load_task("docstring", tokenizer, sizes=SMALL), tokenizer):
        arguments = re.search(r"\(self, (.*)\)", clean)[1].split(", ")
        assert re.findall(r":param (\w+)", clean) == arguments[2:4]
        assert answer == arguments[4]
        assert distractor in set(arguments) - {answer}
        assert answer not in re.findall(r"\w+", corrupted)
        assert not set(re.findall(r":param (\w+)", corrupted)) & set(
            re.search(r"self, (.*)\)", corrupted)[1].split(", ")
        )


def test_special_tokens_of_the_tokenizer(metaspace):
    for name in ("ioi-t1", "docstring", "gendered-pronoun"):
        examples = load_task(name, metaspace, sizes=SMALL).split("train")
        assert (examples.input_ids[:, :2] == 1).sum() == len(examples)
        assert not (examples.input_ids == 2).any()


@pytest.mark.parametrize("name", YEARS)
def test_years_in_a_tokenizer_that_cuts_digits_one_by_one(name, metaspace):
    with pytest.raises(InputError, match=r"00\.\.99 are a token each; '\d\d' is none"):
        load_task(name, metaspace)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tokenizer", ["stories", "letters"])
def test_a_tokenizer_a_task_does_not_fit_is_one_clear_line(name, tokenizer, request):
    tiny = request.getfixturevalue(tokenizer)
    if tokenizer == "stories" and name in ("gendered-pronoun", "acronyms"):
        assert len(load_task(name, tiny, sizes=SMALL).split("test")) == SMALL["test"]
        return
    with pytest.raises(InputError, match=rf"^task {name}\b[^\n]+$"):
        load_task(name, tiny, sizes=SMALL)


@pytest.mark.parametrize("name", SIZES)
def test_a_tokenizer_without_a_vocabulary(name):
    """What ``GPT2TokenizerFast(vocab_file=...)`` makes of a keyword it does not know."""
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match=rf"task {name}: the tokenizer makes no token of 'a' \(its vocabulary has 0\)"):
        load_task(name, bare, sizes=SMALL)


def test_the_word_that_is_split_is_named(stories):
    with pytest.raises(InputError, match=r"splits the answer '(True|False)' into \d tokens after"):
        load_task("boolean-few-shot", stories, sizes=SMALL)
    with pytest.raises(InputError, match=r"has \d+ of 99 \('\w+' takes \d"):
        load_task("ioi-t1", stories)


def test_more_prompts_than_there_are(gpt2):
    with pytest.raises(InputError, match=r"task gendered-pronoun has only about \d+ different prompts for its val"):
        load_task("gendered-pronoun", gpt2, sizes={"validation": 20_000})

"""The shipped models load offline, tokenize exactly as their sources and give the stored logits."""

import hashlib
import json
import random
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastcircuit.models.modeling_tracr  # noqa: F401 (makes the Auto classes know the compiled models)
from fastcircuit import zoo

DATA = Path(__file__).parent / "data"
PAIRS = Path(__file__).parents[1] / "tasks" / "data" / "stories260K_pronoun_pairs.json"


@pytest.fixture(scope="module")
def stories():
    return AutoTokenizer.from_pretrained(zoo.resolve("stories260K"))


@pytest.fixture(scope="module")
def letters():
    return AutoTokenizer.from_pretrained(zoo.resolve("induction-gpt2"))


def test_names_and_paths():
    assert zoo.names() == ["induction-gpt2", "stories260K", "tracr-reverse", "tracr-xproportion"]
    assert all(zoo.path(name).is_dir() for name in zoo.names())
    assert zoo.path("gpt2") is None
    assert zoo.path("") is None
    assert zoo.path("..") is None


def test_resolve_leaves_ids_and_directories_alone(tmp_path):
    assert zoo.resolve("openai-community/gpt2") == "openai-community/gpt2"
    assert zoo.resolve(tmp_path) == str(tmp_path)
    assert zoo.resolve("./stories260K") == "./stories260K"
    assert Path(zoo.resolve("stories260K")) == zoo.path("stories260K")


@pytest.mark.parametrize("name", zoo.names())
def test_directory_is_complete_and_its_readme_names_the_weights(name):
    folder = zoo.path(name)
    for needed in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (folder / needed).stat().st_size > 0
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (folder / "README.md").read_text()
    assert "Copyright (c)" in (folder / "LICENSE").read_text()


def test_zoo_is_small():
    assert sum(f.stat().st_size for f in Path(zoo.__file__).parent.rglob("*") if f.is_file()) < 4_000_000


@pytest.mark.parametrize("name", zoo.names())
def test_weights_load_unchanged_in_fp32(name):
    model, loading = AutoModelForCausalLM.from_pretrained(zoo.resolve(name), output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.float32
    state = model.state_dict()
    for key, raw in load_file(zoo.path(name) / "model.safetensors").items():
        torch.testing.assert_close(state[key], raw, rtol=0, atol=0)


def test_stories_gives_the_stored_logit_differences():
    model = AutoModelForCausalLM.from_pretrained(zoo.resolve("stories260K"))
    pairs = json.loads(PAIRS.read_text())["prompts"]
    for prompt, stored in (("clean_ids", "clean_logit_diff"), ("corrupt_ids", "corrupt_logit_diff")):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(pair[prompt]) for pair in pairs], batch_first=True)
        last = torch.tensor([len(pair[prompt]) - 1 for pair in pairs])
        with torch.no_grad():
            logits = model(ids).logits[torch.arange(len(pairs)), last]
        answer, wrong = (logits.gather(1, torch.tensor([[p[key]] for p in pairs])) for key in ("answer", "wrong"))
        torch.testing.assert_close((answer - wrong)[:, 0], torch.tensor([p[stored] for p in pairs]), rtol=0, atol=1e-4)


def test_stories_tokenizer_equals_stored_sentencepiece(stories):
    for line in (DATA / "sentencepiece_golden.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert stories(row["text"])["input_ids"] == row["ids"], row["text"]
        assert stories.decode(row["ids"], skip_special_tokens=True) == row["decoded"], row["text"]


def test_stories_tokenizer_equals_the_pairs(stories):
    for pair in json.loads(PAIRS.read_text())["prompts"]:
        assert stories(pair["clean"])["input_ids"] == pair["clean_ids"]
        assert stories(pair["corrupt"])["input_ids"] == pair["corrupt_ids"]
        assert stories.decode(pair["clean_ids"], skip_special_tokens=True) == pair["clean"]


def test_stories_tokenizer_equals_sentencepiece_on_random_text(stories):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tok512.model"))
    pieces = [source.id_to_piece(i).replace("▁", " ") for i in range(259, 512)]
    odd = list("abcXYZ   019.,!?\"'-\n\té中文日😀\u200a\u00a0\u3000▁~\u0301Å②ﬁ")
    generator = random.Random(7)
    for _ in range(2000):
        text = "".join(generator.choice(generator.choice((pieces, odd))) for _ in range(generator.randint(0, 25)))
        ids = [1, *source.encode(text)]
        assert stories(text)["input_ids"] == ids, text
        assert stories.decode(ids, skip_special_tokens=True) == source.decode(ids), text


def test_stories_special_tokens(stories):
    assert (stories.bos_token_id, stories.eos_token_id, stories.unk_token_id) == (1, 2, 0)
    assert len(stories) == 512
    assert stories("").input_ids == [1]
    assert stories("Hi", add_special_tokens=False).input_ids == stories("Hi").input_ids[1:]


def test_letters_tokenizer(letters):
    ids = letters("abcxyz")["input_ids"]
    assert ids == [0, 1, 2, 3, 24, 25, 26]
    assert letters.decode(ids, skip_special_tokens=True) == "abcxyz"
    assert letters.bos_token_id == letters.eos_token_id == 0
    assert len(letters) == 27


@pytest.mark.parametrize("text", ["aBc", "a b", "a\n", "é", "1"])
def test_letters_tokenizer_refuses_other_characters(letters, text):
    with pytest.raises(Exception, match="Missing"):
        letters(text)


@pytest.mark.parametrize("name", zoo.names())
def test_loads_without_sentencepiece_and_offline(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert AutoTokenizer.from_pretrained(zoo.resolve(name)).is_fast
    assert AutoModelForCausalLM.from_pretrained(zoo.resolve(name)).dtype == torch.float32

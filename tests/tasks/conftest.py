"""Tokenizers to read tasks with: the two shipped ones, and GPT-2's (OpenAI, modified MIT licence)."""

import lzma
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastcircuit import zoo

DATA = Path(__file__).parent / "data"


def byte_characters():
    """The 256 characters that stand for bytes, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


@pytest.fixture(scope="session")
def stories():
    return AutoTokenizer.from_pretrained(zoo.resolve("stories260K"))


@pytest.fixture(scope="session")
def letters():
    return AutoTokenizer.from_pretrained(zoo.resolve("induction-gpt2"))


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's byte-level BPE, whole; no token is added in front. Its vocabulary follows from its merges."""
    lines = lzma.decompress((DATA / "gpt2_vocab.bpe.xz").read_bytes()).decode().splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    tokens = [*byte_characters(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **special)


@pytest.fixture(scope="session")
def stories_model():
    return AutoModelForCausalLM.from_pretrained(zoo.resolve("stories260K"))


@pytest.fixture(scope="session")
def induction_model():
    return AutoModelForCausalLM.from_pretrained(zoo.resolve("induction-gpt2"))

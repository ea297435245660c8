"""Commands to call in this process, and models and pairs to call them on."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastcircuit import cli
from tests.models.tiny import tiny_model

NAMES = {"She": ["Anna", "Mary", "Lucy", "Emma"], "He": ["Tom", "Ben", "Max", "Sam"]}
WORDS = ["?", ".", "saw", "the", "dog", "cat", "barking", "She", "He", *NAMES["She"], *NAMES["He"]]
QUICK = ["--steps", "12", "--batch-size", "4", "--edges", "40"]


def pairs():
    for animal in ("dog", "cat"):
        for she, he in zip(*NAMES.values(), strict=True):
            yield {"clean": f"{she} saw the {animal} .<predict> She</predict>", "corrupted": f"{he} saw the {animal} ."}
            yield {"clean": f"{he} saw the {animal} .<predict> He</predict>", "corrupted": f"{she} saw the {animal} ."}


def write_pairs(path, rows):
    """A JSONL file of pairs."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_tiny(path, name, words=WORDS):
    """A tiny random model and a tokenizer of whole words as a Hugging Face directory."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", model_max_length=16).save_pretrained(path)
    tiny_model(name, torch.float32).save_pretrained(path)
    return path


def call(*arguments):
    """Exit code of ``fastcircuit arguments``."""
    before, sys.argv = sys.argv, ["fastcircuit", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    return stopped.value.code

"""The model and the task of a command: what is wrong with them is said by name."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from fastcircuit.errors import InputError
from fastcircuit.models.masked import MaskedCausalLM
from tests.cli.calls import WORDS, save_tiny

BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "no model": ("discover", "Missing argument"),
    "unknown model": (
        "discover no-such-model --task pronoun",
        "Accepted: a shipped model (induction-gpt2, stories260K",
    ),
    "path to no model": ("discover ./nothing --task pronoun", "no such model directory: ./nothing"),
    "weights to no model": ("discover a.safetensors --task pronoun", "no such model directory: a.safetensors"),
    "file as model": ("discover {shelf}/pairs.jsonl --task pronoun", "is a file; name the directory"),
    "directory as model": ("discover {shelf} --task pronoun", "is no model directory: there is no config.json in it"),
    "task": ("discover {shelf}/gpt2 --task nothing", "no task 'nothing'; tasks: acronyms, boolean-few-shot, "),
    "task that does not fit": ("discover {shelf}/gpt2 --task induction", "one token per letter"),
    "task and data": ("discover {shelf}/gpt2 --task pronoun --data {shelf}/pairs.jsonl", "--task NAME"),
    "no task": ("discover {shelf}/gpt2", "pronoun-212, tracr-reverse, tracr-xproportion) or --data PAIRS.jsonl"),
    "no data": ("discover {shelf}/gpt2 --data nothing.jsonl", "data file nothing.jsonl does not exist"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)


def row(clean, corrupted="Ben saw the dog ."):
    return json.dumps({"clean": clean, "corrupted": corrupted}) + "\n"


GOOD_ROW = row("Anna saw the dog .<predict> She</predict>")
BAD_ROWS = {
    "no JSON": ('{"clean": "An\n', "pairs.jsonl line 2: not valid JSON"),
    "a key missing": ('{"clean": "x"}\n', 'pairs.jsonl line 2: "corrupted" is missing'),
    "no span": (row("Anna saw"), 'pairs.jsonl line 2: "clean" has no <predict>...</predict> span'),
    "lengths": (row("Anna saw the .<predict> She</predict>"), "line 2: the clean prompt has 4 tokens"),
    "inside a token": (row("Anna saw the dog bark<predict>ing</predict>"), "line 2: the answer 'ing' cuts the token"),
    "too long": (row("dog " * 20 + "<predict>She</predict>", "cat " * 20), "the model reads 16"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(refuses, case):
    bad, message = BAD_ROWS[case]
    Path("pairs.jsonl").write_text(GOOD_ROW + bad + GOOD_ROW)
    refuses("discover {shelf}/gpt2 --data pairs.jsonl", message)


def test_a_tokenizer_of_another_model_is_named(refuses):
    words = [*WORDS[:7], *(f"w{i}" for i in range(41)), *WORDS[7:]]
    save_tiny(Path("model"), "gpt2", words)
    message = "is outside the vocabulary of 41 tokens; load the task with the model's own tokenizer"
    refuses("discover ./model --data {shelf}/pairs.jsonl", message)


def break_weights(name, change):
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(_):
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def poison(_):
    break_weights("transformer.h.1.mlp.c_fc.weight", lambda tensors, name: tensors[name][3].fill_(float("nan")))


def drop(_):
    break_weights("transformer.h.1.mlp.c_fc.weight", lambda tensors, name: tensors.pop(name))


def reshape(_):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "n_embd": 48}))


def add(_):
    norm, gate = "transformer.h.1.ln_1.bias", "transformer.h.1.attn.c_gate.weight"
    break_weights(norm, lambda tensors, name: tensors.update({gate: tensors[name].clone()}))


def unsupported(_):
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained("model")


def strange_activation(_):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "activation_function": "zork"}))


def uneven_heads(_):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "n_head": 7}))


def no_config(_):
    Path("model/config.json").write_text("{")


def no_tokenizer(_):
    Path("model/tokenizer.json").write_text("{}")


BROKEN_MODELS = {
    truncate: "cannot load model './model': its safetensors file is damaged or cut short (",
    poison: "weight transformer.h.1.mlp.c_fc.weight holds NaN or infinity",
    drop: "1 weight(s) are not in its file, such as transformer.h.1.mlp.c_fc.weight",
    reshape: "weight(s) in its file are not of the shape that its config.json says, such as ",
    add: "1 weight(s) in its file have no place in the model that its config.json says, such as ",
    unsupported: "architecture 'bert' is not supported; supported: gpt2, llama, mistral, qwen2",
    strange_activation: "cannot load model './model': 'zork' is not known",
    uneven_heads: "divisible by",
    no_config: "cannot load model './model': ",
    no_tokenizer: "cannot load the tokenizer of './model': ",
}


@pytest.mark.parametrize("damage", BROKEN_MODELS, ids=lambda damage: damage.__name__)
def test_a_broken_model_is_refused(refuses, damage):
    save_tiny(Path("model"), "gpt2")
    damage(Path("model"))
    refuses("discover ./model --data {shelf}/pairs.jsonl", BROKEN_MODELS[damage])


@pytest.mark.parametrize("damage", [damage for damage in BROKEN_MODELS if damage is not no_tokenizer])
def test_from_pretrained_refuses_a_broken_model_alike(damage):
    save_tiny(Path("model"), "gpt2")
    damage(Path("model"))
    with pytest.raises(InputError, match=re.escape(BROKEN_MODELS[damage])):
        MaskedCausalLM.from_pretrained("./model")

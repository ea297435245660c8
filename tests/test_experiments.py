"""docs/experiments.md: every command is right, and runs up to the loaded model, on a tiny one in its place."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastcircuit.circuit import Circuit
from fastcircuit.errors import RunError
from fastcircuit.graph import Graph
from fastcircuit.models import loading
from tests.cli.calls import call

TEXT = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
HEADS = {"gpt2": 12, "codellama/CodeLlama-13b-Instruct-hf": 40, "tracr-reverse": 1, "tracr-xproportion": 1}
SHIPPED = ("tracr-reverse", "tracr-xproportion")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models with as many layers and heads as the real ones, one number wide per head."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=100, n_positions=64, n_embd=24, n_layer=12, n_head=12)
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    llama = LlamaConfig(
        vocab_size=100, hidden_size=80, intermediate_size=8, num_hidden_layers=40, num_attention_heads=40
    )
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    return {"gpt2": root / "gpt2", "codellama/CodeLlama-13b-Instruct-hf": root / "llama", **{n: n for n in SHIPPED}}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[1:5]))
def test_every_command_loads_its_model(command, models, tmp_path, monkeypatch, capsys):
    name = next(name for name in models if name in command.split())
    for circuit in re.findall(r"runs/\S*circuit\.json", command):
        graph = Graph(HEADS[name], HEADS[name], HEADS[name], "split" if name == "gpt2" else "none")
        Circuit(graph, np.arange(graph.num_edges) < 1000).save(tmp_path / circuit)
    if "masks.safetensors" in command:
        (tmp_path / "runs/ioi-one/masks.safetensors").touch()
    loaded, really = [], loading.load_model

    def load(*arguments):
        loaded.append(really(*arguments))
        raise RunError("the model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", load)
    arguments = shlex.split(command.replace(name, str(models[name])))
    assert arguments.pop(0) == "fastcircuit"
    assert call(*arguments) == 1
    assert "the model is loaded" in capsys.readouterr().err
    assert loaded[0].graph.num_heads == HEADS[name]
    if name.startswith("codellama") and "discover" in command:
        assert loaded[0].graph.num_edges == 3_872_820  # the paper's

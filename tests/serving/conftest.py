"""Circuits of the shipped models, saved, and one server process that serves them all."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastcircuit.models.loading import load_tokenizer
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Kept
from fastcircuit.submodel.saving import load_submodel, save_submodel
from tests.submodel.circuits import constants_of, headless, load

SERVE = "import sys; from fastcircuit.serving.server import serve; serve(sys.argv[1:], port=0)"
ANSWERS = [397, 408, 411]


def nearly_whole(model, ablation="mean", **options):
    """A circuit that still writes sentences: only the last MLP and one head of each layer are gone."""
    layers, heads = model.graph.num_layers, model.graph.num_heads
    kept = Kept(np.ones((layers, heads), bool), np.arange(layers) < layers - 1)
    kept.heads[:, -1] = heads == 1
    return compile_submodel(model, kept, constants_of(model, ablation), **options)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Saved circuits by name."""
    root = tmp_path_factory.mktemp("served")
    stories, induction = (load(name, torch.float32) for name in ("stories260K", "induction-gpt2"))
    circuits = {
        "stories": (stories, nearly_whole(stories)),
        "headless": (stories, headless(stories)[2]),
        "answers": (stories, nearly_whole(stories, answer_tokens=ANSWERS)),
        "induction": (induction, nearly_whole(induction)),
        "positional": (induction, nearly_whole(induction, "mean-positional")),
    }
    for name, (model, circuit) in circuits.items():
        tokenizer = load_tokenizer(model.config.name_or_path)
        save_submodel(circuit, root / name, tokenizer=tokenizer)
    return {name: root / name for name in circuits}


@pytest.fixture(scope="session")
def models(directories):
    """The same circuits in this process, each with its tokenizer: the truth."""
    return {name: (load_submodel(path), load_tokenizer(str(path))) for name, path in directories.items()}


def start_server(*directories):
    """A server process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *map(str, directories)], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    line = process.stderr.readline()
    assert line.startswith("serving "), line + process.stderr.read()
    return process, line.split(" at ")[1].split()[0]


@pytest.fixture(scope="session")
def url(directories):
    process, address = start_server(*directories.values())
    yield address
    assert process.poll() is None, "the server did not stay up"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="session")
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

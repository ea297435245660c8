"""``fastcircuit convert``: files in, files out, and one line for what cannot be converted."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config

from fastcircuit import cli
from fastcircuit.circuit import Circuit
from fastcircuit.formats import read
from fastcircuit.graph import Graph

REAL = Path(__file__).parents[1] / "formats" / "data" / "gpt2_ioi_eap-ig.json.gz"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """``run(*arguments)``: exit code, stdout and stderr of ``fastcircuit convert``, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastcircuit", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_there_and_back(run):
    real = read(REAL)
    assert run(REAL, "ours.json")[0] == 0
    assert Circuit.load("ours.json") == real.circuit
    code, out, err = run(REAL, "top.json", "--edges", 300, "--embedding-nodes", "split", "--json")
    assert (code, err) == (0, "")
    split = Circuit.load("top.json")
    assert json.loads(out) == {
        "edges": split.num_edges,
        "total_edges": 32936,
        "format": "fastcircuit",
        "scores": False,
        "files": ["top.json"],
    }
    assert [edge for edge in split.edges if not edge[0].endswith("embeds")] == [
        edge for edge in real.top(300).edges if edge[0] != "embeds"
    ]
    assert run("top.json", "edges.json", "--to", "edge-pruning")[0] == 0
    assert Circuit.load("edges.json", Graph(12, 12, 12)) == split
    assert run("top.json", "hooks.json", "--to", "acdc")[0] == 0
    assert Circuit.load("hooks.json", Graph(12, 12, 12)) == split
    assert run("top.json", "eap.json.gz", "--to", "eap-ig")[0] == 0
    assert read("eap.json.gz").circuit == real.top(300)
    assert run(REAL, "again.json", "--to", "eap-ig")[0] == 0
    assert Path("again.json").read_bytes() == gzip.decompress(REAL.read_bytes())


def test_scores_go_along_and_come_back(run):
    real = read(REAL)
    code, out, _ = run(REAL, "circuit.json", "--json")
    assert (code, json.loads(out)["files"]) == (0, ["circuit.json", "masks.safetensors"])
    assert json.loads(out)["scores"]
    ours = read("circuit.json")
    assert np.array_equal(ours.edge_scores, real.edge_scores)
    assert ours.circuit == real.circuit
    assert run("circuit.json", "back.json", "--to", "eap-ig")[0] == 0
    back = read("back.json")
    assert np.array_equal(back.edge_scores, real.edge_scores)
    assert back.circuit == real.circuit
    assert run("circuit.json", "top.json", "--edges", 300)[1].startswith("wrote top.json, top.masks.safetensors: ")
    assert Circuit.load("top.json") == real.top(300)
    assert run("circuit.json", "bare.json", "--to", "eap-ig", "--no-scores")[0] == 0
    assert not read("bare.json").edge_scores.any()


def test_log_alphas_become_scores_that_rank_the_same(run):
    graph = Graph(3, 4, 4, "joint")
    log_alpha = np.random.default_rng(0).normal(size=graph.num_edges) * 9
    Circuit(graph, log_alpha > 0).save("circuit.json")
    tensors = {"edge": torch.from_numpy(log_alpha), "node": torch.zeros(graph.num_writers)}
    save_file(tensors, "masks.safetensors", metadata={"columns": "step,kl"})
    assert read("circuit.json").top(50) == Circuit(graph, log_alpha >= np.sort(log_alpha)[-50])
    assert run("circuit.json", "c.json", "--to", "eap-ig")[0] == 0
    found = read("c.json")
    assert found.top(50) == read("circuit.json").top(50)
    assert np.log(found.edge_scores) == pytest.approx(log_alpha)
    assert run("circuit.json", "again.json")[0] == 0
    assert read("again.json").log_alpha
    assert np.array_equal(read("again.json").edge_scores, log_alpha)


def test_scores_that_lie_beside_the_wrong_circuit(run):
    for name, layers in (("circuit.json", 3), ("other.json", 2)):
        Circuit.full(Graph(layers, 4, 4, "split")).save(name)
    graph = Graph(3, 4, 4, "split")
    tensors = {"edge": torch.ones(graph.num_edges), "node": torch.ones(graph.num_writers)}
    save_file(tensors, "masks.safetensors")
    code, _, err = run("circuit.json", "c.json", "--to", "eap-ig")
    assert code == 2
    assert "scores cannot be taken to EAP-IG's graph" in err
    assert "--no-scores" in err
    assert run("circuit.json", "c.json", "--to", "eap-ig", "--no-scores")[0] == 0
    code, _, err = run("other.json", "circuit.json")
    assert (code, "holds scores of another circuit, and this one has none" in err) == (2, True)
    Path("masks.safetensors").rename("other.masks.safetensors")
    code, _, err = run("other.json", "d.json")
    assert (code, "it is of another circuit, move it away" in err) == (2, True)
    assert Circuit.load("other.json").num_edges  # the circuit alone does not look for scores


def test_edge_pruning_lists_are_of_an_architecture(run):
    code, _, err = run(REAL, "edges.json", "--to", "edge-pruning", "--edges", 300)
    assert (code, "does not say of which model it is" in err) == (2, True)
    GPT2Config().save_pretrained("gpt2")
    assert run(REAL, "edges.json", "--to", "edge-pruning", "--model", "gpt2", "--embedding-nodes", "joint")[0] == 0
    writers = {writer for writer, _ in json.loads(Path("edges.json").read_text())}
    assert {"tok_embeds", "pos_embeds"} < writers
    assert "embeds" not in writers
    assert Circuit.load("edges.json", Graph(12, 12, 12, "joint")) == read(REAL).circuit


def test_an_edge_list_is_of_a_model(run):
    Path("edges.json").write_text('[["embeds", "a1.h0.q"], ["a1.h0", "resid_post"]]')
    code, out, _ = run("edges.json", "c.json", "--model", "stories260K")
    assert (code, out) == (0, "wrote c.json: Circuit(2 of 1701 edges, 2 writers, task=None)\n")
    assert Circuit.load("c.json").graph == Graph(5, 8, 4, "joint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edges.json", "c.json"], "does not say which model it is of"),
        (["edges.json", "c.json", "--model", "nowhere/at/all"], "no such model directory"),
        (["edges.json", "c.json", "--model", "induction-gpt2"], "no reader 'a4.h0.q'"),
        ([REAL, "c.json", "--model", "stories260K"], "over 12 layers of 12 heads"),
        ([REAL, "c.json", "--to", "dot"], "no circuit format 'dot'; formats: fastcircuit, edge-pruning, eap-ig, acdc"),
        ([REAL, "c.json", "--edges", "0"], "edges is 0; this graph has 1 to 32491"),
        ([REAL, "c.json", "--embedding-nodes", "none"], "embeddings are always kept"),
        (["missing.json", "c.json"], "circuit file missing.json does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_line(run, arguments, message):
    Path("edges.json").write_text('[["embeds", "a4.h0.q"]]')
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert err.count("\n") == 1
    assert not Path("c.json").exists()

"""``fastcircuit convert``: files in, files out, and one line for what cannot be converted."""

import gzip
import json
import sys
from pathlib import Path

import pytest

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

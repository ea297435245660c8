"""Circuits: files, set algebra, pruning."""

import json

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError, RunError
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from tests.models.tiny import tiny_model

GRAPH = Graph(2, 2, 1, "split")
EDGES = [("tok_embeds", "a0.h0.v"), ("a0.h0", "a1.h0.k"), ("a1.h1", "resid_post")]


def random_circuit(graph, density=0.2, seed=0, **about):
    return Circuit(graph, np.random.default_rng(seed).random(graph.num_edges) < density, **about)


def test_round_trip(tmp_path):
    circuit = Circuit.from_edges(
        GRAPH,
        EDGES,
        model={"name": "x"},
        task="t",
        ablation="mean",
        metrics={"test": {"kl": 0.5}},
        provenance={"seed": 3},
    )
    circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert loaded == circuit
    assert loaded.to_dict() == circuit.to_dict()
    assert sorted(loaded.edges) == sorted(EDGES)
    assert loaded.nodes == ["tok_embeds", "a0.h0", "a1.h1"]
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.json"]


def test_edge_pruning_edge_list(tmp_path):
    circuit = Circuit.from_edges(GRAPH, EDGES)
    circuit.save_edge_list(tmp_path / "edges.json")
    assert json.loads((tmp_path / "edges.json").read_text())[0] == ["tok_embeds", "a0.h0.v"]
    assert Circuit.load(tmp_path / "edges.json", GRAPH) == circuit
    with pytest.raises(InputError, match="does not say which model"):
        Circuit.load(tmp_path / "edges.json")


def test_set_algebra():
    a, b = random_circuit(GRAPH, seed=1), random_circuit(GRAPH, seed=2)
    assert set((a & b).edges) == set(a.edges) & set(b.edges)
    assert set((a | b).edges) == set(a.edges) | set(b.edges)
    assert set((a - b).edges) == set(a.edges) - set(b.edges)
    assert set((a ^ b).edges) == set(a.edges) ^ set(b.edges)
    assert (a & b) <= a
    assert not (a | b) <= a
    assert a.edges[0] in a
    assert hash(a & a) == hash(a)
    with pytest.raises(InputError, match="different graphs"):
        a & random_circuit(Graph(2, 2, 2))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("name", "nodes"), [("gpt2", "split"), ("llama", "joint"), ("llama", "none")])
def test_pruning_does_not_change_the_model(name, nodes, seed):
    model = MaskedCausalLM(tiny_model(name), nodes)
    circuit = random_circuit(model.graph, 0.06, seed)
    pruned = circuit.pruned()
    assert pruned <= circuit
    assert pruned.pruned() == pruned
    ids = torch.randint(41, (2, 3, 5), generator=torch.Generator().manual_seed(seed))
    logits = [
        model(ids[0], corrupted_input_ids=ids[1], masks=Masks.from_circuit(each)).logits for each in (circuit, pruned)
    ]
    torch.testing.assert_close(*logits)


def test_pruning_drops_what_is_not_read_or_not_fed():
    circuit = Circuit.from_edges(
        GRAPH,
        [
            ("tok_embeds", "a0.h0.v"),  # a0.h0 is read below: kept
            ("a0.h0", "resid_post"),
            ("pos_embeds", "a0.h1.q"),  # nothing reads a0.h1
            ("a1.h0", "resid_post"),  # nothing feeds a1.h0
        ],
    )
    assert circuit.pruned().edges == [("tok_embeds", "a0.h0.v"), ("a0.h0", "resid_post")]
    under_mean = Circuit(GRAPH, circuit.keep, ablation="mean").pruned()
    assert ("a1.h0", "resid_post") in under_mean


BAD = {
    "not json": ("{", "not valid JSON"),
    "another format": ('{"format": "x"}', "accepted: "),
    "a number": ("3", "int"),
    "field missing": ('{"format": "fastcircuit.circuit/1"}', "it has no 'graph'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line_that_names_the_file(tmp_path, case):
    text, message = BAD[case]
    path = tmp_path / "circuit.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Circuit.load(path)
    assert "circuit.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_changed_fields_are_refused(tmp_path):
    good = Circuit.from_edges(GRAPH, EDGES).to_dict()
    for change, message in (
        ({"graph": {}}, "must have exactly"),
        ({"graph": {**good["graph"], "num_heads": "two"}}, "malformed"),
        ({"edges": [["tok_embeds"]]}, "is not a .writer, reader. pair"),
        ({"edges": [["a7.h0", "m1"]]}, "no writer 'a7.h0'"),
        ({"edges": 3}, "not a list"),
        ({"metrics": [1]}, r'its "metrics" is not an object but \[1\]'),
        ({"model": None}, 'its "model" is not an object but None'),
        ({"ablation": "none"}, "accepted: interchange, mean, zero"),
        ({"output_bias": "gone"}, "output_bias is 'gone'; accepted: split, kept"),
    ):
        (tmp_path / "c.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=message):
            Circuit.load(tmp_path / "c.json")


def test_another_graph_is_refused(tmp_path):
    Circuit.from_edges(GRAPH, EDGES).save(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"2 layers of 2 heads .* this model has 3 layers"):
        Circuit.load(tmp_path / "c.json", Graph(3, 2, 2))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        Circuit.from_edges(GRAPH, EDGES).save(tmp_path / "c.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_where_the_output_bias_goes_and_an_older_one_means_split(tmp_path):
    kept = Circuit.from_edges(GRAPH, EDGES, ablation="zero", output_bias="kept")
    kept.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json").output_bias == (kept & kept).output_bias == kept.pruned().output_bias
    assert Circuit.load(tmp_path / "c.json").keeps_output_bias
    older = {name: value for name, value in kept.to_dict().items() if name != "output_bias"}
    assert Circuit.from_dict(older).output_bias == "split"

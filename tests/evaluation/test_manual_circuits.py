"""Manual circuits: counts of the papers, over every way to count embeddings, and only of their own model."""

import pytest

from fastcircuit.errors import InputError
from fastcircuit.evaluation.manual_circuits import manual_circuit, manual_circuit_names
from fastcircuit.formats import to_graph
from fastcircuit.graph import Graph

JOINT, SPLIT, NONE = (Graph(12, 12, 12, nodes) for nodes in ("joint", "split", "none"))
ATTENTION_ONLY = Graph(4, 8, 8, "joint")
# Heads and edges: Wang et al. 26 heads, which ACDC counts 1041 edges for, 78 of them within the heads; Hanna et al.'s
# graph in the MIB track 240; Heimersheim and Janiak 37, of which 13 are within the heads.
COUNTS = {
    "ioi": (26, 963),
    "greater-than": (11, 240),
    "docstring": (6, 24),
    "acronyms": (8, None),
    "ioi-extraction": (23, None),
    "greater-than-extraction": (8, None),
}


def test_every_circuit_has_the_published_size():
    assert manual_circuit_names() == sorted(COUNTS)
    for name, (heads, edges) in COUNTS.items():
        found = manual_circuit(name, ATTENTION_ONLY if name == "docstring" else JOINT)
        assert len(found.heads) == heads
        assert (found.circuit.num_edges if found.circuit else None) == edges
        assert found.heads <= found.nodes
        assert found.source
        if found.circuit:
            assert {node for node in found.circuit.nodes if node.startswith("a")} <= found.heads
            readers = {reader.rsplit(".", 1)[0] for _, reader in found.circuit.edges if reader.startswith("a")}
            assert readers <= found.heads
            assert found.circuit.pruned() == found.circuit


def test_known_parts():
    ioi = manual_circuit("ioi", JOINT)
    assert {"a9.h9", "a9.h6", "a10.h0", "a5.h5", "a7.h3"} <= ioi.heads
    for edge in (("a9.h9", "resid_post"), ("a7.h3", "a9.h9.q"), ("a5.h5", "a7.h3.v"), ("a2.h2", "a5.h5.k")):
        assert edge in ioi.circuit
    assert ("a7.h3", "a9.h9.v") not in ioi.circuit
    assert {f"m{layer}" for layer in (0, 1, 2, 3, 8, 9, 10, 11)} < manual_circuit("greater-than", JOINT).nodes
    induction = manual_circuit("docstring", ATTENTION_ONLY).circuit
    assert [writer for writer, reader in induction.edges if reader == "resid_post"] == ["a3.h0", "a3.h6"]
    assert manual_circuit("ioi", JOINT).heads - manual_circuit("ioi-extraction", JOINT).heads == {
        "a0.h10",
        "a5.h8",
        "a5.h9",
    }


@pytest.mark.parametrize("name", ["ioi", "greater-than"])
def test_over_split_and_no_embeddings(name):
    joint, split, none = (manual_circuit(name, graph).circuit for graph in (JOINT, SPLIT, NONE))
    assert split == to_graph(joint, SPLIT)
    assert none.edges == [edge for edge in joint.edges if edge[0] != "embeds"]


@pytest.mark.parametrize("graph", [Graph(12, 12, 4), Graph(4, 8, 8), Graph(24, 16, 16)])
def test_another_models_graph_is_refused(graph):
    with pytest.raises(InputError, match=r"ioi is of GPT-2 small: 12 layers of 12 heads; this graph has"):
        manual_circuit("ioi", graph)


def test_unknown_names_list_the_known():
    with pytest.raises(InputError, match=r"no manual circuit 'induction'; there are: acronyms, docstring, greater"):
        manual_circuit("induction", JOINT)

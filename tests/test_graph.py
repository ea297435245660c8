"""Numbering, names and counts of the computational graph."""

import time

import pytest
from transformers import GPT2Config, LlamaConfig

from fastcircuit.errors import InputError
from fastcircuit.graph import Graph

CODELLAMA_13B = {"num_layers": 40, "num_heads": 40, "num_kv_heads": 40}


@pytest.mark.parametrize(
    ("graph", "count"),
    [
        (Graph(12, 12, 12, "split"), 32_936),
        (Graph(12, 12, 12, "joint"), 32_491),
        (Graph(12, 12, 12, "none"), 32_046),
        (Graph(**CODELLAMA_13B, embedding_nodes="none"), 3_872_820),
        (Graph(**CODELLAMA_13B, embedding_nodes="joint"), 3_877_661),
        (Graph(5, 8, 4, "joint"), 1_701),
        (Graph(2, 1, 1, "split"), 32),
    ],
)
def test_counts_are_the_published_ones(graph, count):
    assert graph.num_edges == count
    assert graph.num_edges == sum(site.num_edges for site in graph.sites)


def test_codellama_builds_in_under_two_seconds():
    start = time.process_time()
    graph = Graph(**CODELLAMA_13B, embedding_nodes="none")
    assert len(graph.edges) == 3_872_820
    assert graph.edge_writers.shape == graph.edge_readers.shape == (3_872_820,)
    assert time.process_time() - start < 2


def test_from_config():
    assert Graph.from_config(GPT2Config()) == Graph(12, 12, 12, "split")
    llama = LlamaConfig(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4)
    assert Graph.from_config(llama) == Graph(5, 8, 4, "joint")
    assert Graph.from_config(llama, "none").num_edges == Graph(5, 8, 4, "none").num_edges


def test_names_follow_the_edge_pruning_code():
    graph = Graph(2, 2, 1, "split")
    assert graph.writers == ("tok_embeds", "pos_embeds", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert graph.readers[:5] == ("a0.h0.q", "a0.h1.q", "a0.h0.k", "a0.h0.v", "m0")
    assert graph.readers[-1] == "resid_post"
    assert Graph(1, 1, 1, "joint").writers == ("embeds", "a0.h0", "m0")
    assert Graph(1, 1, 1, "none").writers == ("a0.h0", "m0")


@pytest.mark.parametrize("graph", [Graph(3, 4, 2, "split"), Graph(2, 1, 1, "none"), Graph(1, 6, 3, "joint")])
def test_every_edge_has_its_number_and_goes_forward(graph):
    assert len(graph.edges) == len(set(graph.edges)) == graph.num_edges
    for number, (writer, reader) in enumerate(graph.edges):
        assert graph.edge_id(writer, reader) == number
        assert graph.writers[graph.edge_writers[number]] == writer
        assert graph.readers[graph.edge_readers[number]] == reader
        if reader != "resid_post" and "embeds" not in writer:
            written, read = int(writer[1:].split(".")[0]), int(reader[1:].split(".")[0])
            assert written < read or (written == read and writer.startswith("a") and reader.startswith("m"))


def test_sites_are_blocks_of_the_edge_vector():
    graph = Graph(2, 4, 2, "split")
    for site in graph.sites:
        block = site.view(graph.edge_writers)
        assert block.shape == (site.num_readers, site.num_writers)
        assert (block == range(site.num_writers)).all()


def test_feeds_pairs_readers_with_the_heads_they_serve():
    graph = Graph(1, 4, 2, "joint")
    pairs = {(graph.readers[r], graph.writers[w]) for r, w in zip(*graph.feeds, strict=True)}
    assert ("a0.h1.k", "a0.h2") in pairs
    assert ("a0.h1.k", "a0.h3") in pairs
    assert ("a0.h0.v", "a0.h1") in pairs
    assert ("m0", "m0") in pairs
    assert len(pairs) == 4 * 3 + 1


def test_bad_names_and_shapes_say_what_is_accepted():
    graph = Graph(2, 2, 2, "split")
    with pytest.raises(InputError, match=r"no writer 'a9\.h0'"):
        graph.edge_id("a9.h0", "m1")
    with pytest.raises(InputError, match=r"no reader 'm1.q'.*a0.h0.q"):
        graph.edge_id("a0.h0", "m1.q")
    with pytest.raises(InputError, match=r"m1 is not computed before a0\.h0\.q"):
        graph.edge_id("m1", "a0.h0.q")
    with pytest.raises(InputError, match="accepted: split, joint, none"):
        Graph(2, 2, 2, "both")
    with pytest.raises(InputError, match="too large; at most 32768 heads"):
        Graph(10**7, 8, 4)
    with pytest.raises(InputError, match="divisible"):
        Graph(2, 3, 2)

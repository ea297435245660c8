"""Other tools' circuit files: what they mean, that they come back as they were, and one line for what is wrong.

``data/gpt2_ioi_eap-ig.json.gz`` is of hannamw/MIB-circuit-track (Apache-2.0).
"""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.formats import FORMATS, CircuitFile, parse, read, to_graph, write
from fastcircuit.graph import Graph

REAL = Path(__file__).parent / "data" / "gpt2_ioi_eap-ig.json.gz"
GPT2 = Graph(12, 12, 12, "joint")
JOINT, SPLIT, NONE = (Graph(3, 4, 4, nodes) for nodes in ("joint", "split", "none"))
GROUPED = Graph(3, 4, 2, "joint")


def random_circuit(graph, seed=0, density=0.3, architecture="gpt2"):
    keep = np.random.default_rng(seed).random(graph.num_edges) < density
    return Circuit(graph, keep, model={"architecture": architecture} if architecture else {})


@pytest.fixture(scope="module")
def real():
    return read(REAL)


def full_form(graph, seed=0):
    """A small EAP-IG file, built by name alone."""
    random = np.random.default_rng(seed)
    order = ["input", *(n for n in graph.writers if n != "embeds")]
    edges = {}
    for layer in range(graph.num_layers):
        before = [n for n in order if n == "input" or int(n[1]) < layer]
        heads = [f"a{layer}.h{head}" for head in range(graph.num_heads)]
        edges |= {f"{w}->{h}<{kind}>": 0 for w in before for h in heads for kind in "qkv"}
        edges |= {f"{w}->m{layer}": 0 for w in [*before, *heads]}
    edges |= {f"{w}->logits": 0 for w in order}
    edges = {n: {"score": float(random.normal()), "in_graph": bool(random.random() < 0.2)} for n in edges}
    nodes = {n: {"in_graph": bool(random.random() < 0.5)} for n in [*order, "logits"]}
    cfg = {"n_layers": graph.num_layers, "n_heads": graph.num_heads, "parallel_attn_mlp": False, "d_model": 8}
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


def test_a_real_eap_ig_file_comes_back_byte_for_byte(real, tmp_path):
    raw = gzip.decompress(REAL.read_bytes())
    for name in ("again.json", "again.json.gz"):
        write(tmp_path / name, real, "eap-ig")
        written = (tmp_path / name).read_bytes()
        assert (gzip.decompress(written) if name.endswith(".gz") else written) == raw


def test_a_real_eap_ig_file_means_what_its_names_say(real):
    value = json.loads(gzip.decompress(REAL.read_bytes()))
    assert real.graph == GPT2
    assert GPT2.num_edges == len(value["edges"]) == 32491
    ours = {"embeds": "input", "resid_post": "logits"}
    kept, scores = set(value["in_graph"]), value["edges"]
    for number, (writer, reader) in enumerate(GPT2.edges):
        into = reader if "." not in reader else f"{reader[:-2]}<{reader[-1]}>"
        name = f"{ours.get(writer, writer)}->{ours.get(into, into)}"
        assert real.edge_scores[number] == scores[name]
        assert real.circuit.keep[number] == (name in kept)


def test_the_best_edges(real):
    best = real.top(700)
    assert best.num_edges == 700
    size = np.abs(real.edge_scores)
    assert size[best.keep].min() >= size[~best.keep].max()
    signed = real.top(700, absolute=False)
    assert real.edge_scores[signed.keep].min() >= real.edge_scores[~signed.keep].max()
    for edges in (0, GPT2.num_edges + 1):
        with pytest.raises(InputError, match=f"edges is {edges}; this graph has 1 to 32491"):
            real.top(edges)
    with pytest.raises(InputError, match="no scores"):
        CircuitFile("acdc", real.circuit).top(5)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("via", FORMATS)
def test_a_file_of_every_tool_goes_to_every_tool(tmp_path, via, to):
    file = CircuitFile("fastcircuit", random_circuit(JOINT))
    for step, format in enumerate((via, to)):
        path = tmp_path / f"{step}.json"
        write(path, file, format)
        found = read(path, JOINT)
        assert np.array_equal(found.circuit.keep, file.circuit.keep)
        about = {"architecture": "gpt2"}  # most tools do not keep it
        file = dataclasses.replace(found, circuit=dataclasses.replace(found.circuit, model=about))
    assert file.format == to


def test_a_real_file_goes_to_acdc(real, tmp_path):
    write(tmp_path / "acdc.json", real, "acdc")
    assert np.array_equal(read(tmp_path / "acdc.json", GPT2).circuit.keep, real.circuit.keep)


def test_the_full_form_comes_back(tmp_path):
    value = full_form(JOINT)
    (tmp_path / "in.json").write_text(json.dumps(value))
    file = read(tmp_path / "in.json")
    write(tmp_path / "out.json", file, "eap-ig")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "in.json").read_bytes()
    for node in value["nodes"].values():
        node["score"] = 0.25
    assert (parse(value).node_scores == 0.25).all()


def test_a_circuit_of_ours_for_eap_ig():
    circuit = random_circuit(JOINT)
    value = json.loads(json.dumps(_dumped(circuit, "eap-ig")))
    assert list(value) == ["cfg", "nodes", "edges"]
    assert list(value["edges"]) == list(full_form(JOINT)["edges"])
    assert [name for name, node in value["nodes"].items() if node["in_graph"]] == [
        *("input" if name == "embeds" else name for name in circuit.nodes),
        "logits",
    ]
    assert parse(value).circuit == circuit


def _dumped(circuit, format):
    from fastcircuit.formats import _TOOLS

    return _TOOLS[format].dump(CircuitFile("fastcircuit", circuit))


GRAPHS = {"joint": JOINT, "split": SPLIT, "none": NONE, "grouped": GROUPED}
REFUSED = {
    ("eap-ig", "split"): "keeps one of tok_embeds and pos_embeds",
    ("acdc", "none"): "over embedding nodes 'none' there are none",
}


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("format", FORMATS)
def test_round_trips(format, name, density, tmp_path):
    circuit = random_circuit(GRAPHS[name], density=density)
    path = tmp_path / "c.json"
    if (format, name) in REFUSED and (density == 0.3 or format == "acdc"):
        with pytest.raises(InputError, match=REFUSED[format, name]):
            write(path, circuit, format)
        assert not path.exists()
        return
    write(path, circuit, format)
    assert read(path, circuit.graph).circuit == circuit
    assert Circuit.load(path, circuit.graph) == circuit


@pytest.mark.parametrize("name", ["joint", "none", "split"])
def test_edge_pruning_lists_have_the_embeddings_of_the_published_code(name, tmp_path):
    circuit = random_circuit(GRAPHS[name])
    circuit.save_edge_list(tmp_path / "gpt2.json")
    edges = json.loads((tmp_path / "gpt2.json").read_text())
    assert {writer for writer, _ in edges if writer.endswith("embeds")} == {"tok_embeds", "pos_embeds"}
    assert {tuple(edge) for edge in edges} == set(to_graph(circuit, SPLIT).edges)
    assert read(tmp_path / "gpt2.json", SPLIT).circuit == to_graph(circuit, SPLIT)  # none: nothing of them is removed
    if name == "split":
        return
    for graph, architecture in ((GRAPHS[name], "llama"), (dataclasses.replace(GRAPHS[name], num_kv_heads=2), None)):
        of_llama = random_circuit(graph, architecture=architecture)
        of_llama.save_edge_list(tmp_path / "llama.json")
        edges = json.loads((tmp_path / "llama.json").read_text())
        assert {writer for writer, _ in edges if writer.endswith("embeds")} == {"embeds"}
        joint = dataclasses.replace(graph, embedding_nodes="joint")
        assert read(tmp_path / "llama.json", joint).circuit == to_graph(of_llama, joint)
    with pytest.raises(InputError, match=rf"embeddings as '{name}' and does not say of which model .*convert --model"):
        random_circuit(GRAPHS[name], architecture=None).save_edge_list(tmp_path / "neither.json")
    assert not (tmp_path / "neither.json").exists()


def test_acdc_hooks_mean_our_names(tmp_path):
    rows = [
        ["blocks.2.hook_resid_post", [None], "blocks.1.attn.hook_result", [None, None, 3]],
        ["blocks.1.attn.hook_result", [None, None, 3], "blocks.1.attn.hook_q", [None, None, 3]],
        ["blocks.1.attn.hook_q", [None, None, 3], "blocks.1.hook_q_input", [None, None, 3]],
        ["blocks.1.hook_q_input", [None, None, 3], "blocks.0.hook_mlp_out", [None]],
        ["blocks.1.hook_q_input", [None, None, 3], "hook_pos_embed", [None]],
        ["blocks.1.hook_k_input", [None, None, 3], "hook_embed", [None]],  # no hook_k is computed of it
        ["blocks.0.hook_mlp_out", [None], "blocks.0.hook_mlp_in", [None]],
        ["blocks.0.hook_resid_mid", [None], "hook_embed", [None]],
    ]
    kept = [("tok_embeds", "m0"), ("pos_embeds", "a1.h3.q"), ("m0", "a1.h3.q"), ("a1.h3", "resid_post")]
    file = parse(rows, SPLIT)
    assert file.circuit.edges == kept
    (tmp_path / "in.json").write_text(json.dumps(rows, indent=2) + "\n")
    write(tmp_path / "out.json", read(tmp_path / "in.json", SPLIT), "acdc")
    assert json.loads((tmp_path / "out.json").read_text()) == rows
    effects = [[row, None if i % 2 else 0.5 * i] for i, row in enumerate(rows)]
    assert parse(effects, SPLIT).circuit.edges == kept
    (tmp_path / "effects.json").write_text(json.dumps(effects))
    write(tmp_path / "out.json", read(tmp_path / "effects.json", SPLIT), "acdc")
    assert json.loads((tmp_path / "out.json").read_text()) == effects
    additions = [row for row in rows if row[2].endswith(("embed", "mlp_out")) or "resid_post" in row[0]]
    assert parse(additions, SPLIT).circuit.edges == sorted(
        [*kept, ("tok_embeds", "a1.h3.k")], key=lambda e: SPLIT.edge_id(*e)
    )


def test_the_edge_pruning_wrapper_of_acdc_keeps_the_embeddings():
    value = {
        "original": [{"from": "head.1.2", "to": "resid_post"}, {"from": "mlp.0", "to": "head.1.2.v"}],
        "extra": [{"from": "blocks.1.hook_q_input", "to": "blocks.1.attn.hook_q"}],
    }
    assert parse(value, NONE).circuit.edges == [("m0", "a1.h2.v"), ("a1.h2", "resid_post")]
    kept = parse(value, SPLIT).circuit
    assert sum(writer.endswith("embeds") for writer, _ in kept.edges) == 2 * SPLIT.num_readers
    with pytest.raises(InputError, match=r"edge 1 of its .original. is \{'from': 3\}"):
        parse({"original": [{"from": 3}]}, SPLIT)


def test_embeddings_split_joint_and_none():
    joint = random_circuit(JOINT)
    split = to_graph(joint, SPLIT)
    for reader in SPLIT.readers:
        kept = ("embeds", reader) in joint
        assert (("tok_embeds", reader) in split) == (("pos_embeds", reader) in split) == kept
    rest = [[edge for edge in c.edges if not edge[0].endswith("embeds")] for c in (joint, split)]
    assert rest[0] == rest[1]
    assert to_graph(split, JOINT) == joint
    with pytest.raises(InputError, match=r"removes \w*embeds -> .* over embedding nodes 'none' embeddings are always"):
        to_graph(split, NONE)
    none = random_circuit(NONE)
    both = to_graph(none, SPLIT)
    assert both.num_edges == none.num_edges + 2 * NONE.num_readers
    assert to_graph(both, NONE) == to_graph(to_graph(both, JOINT), NONE) == none


def test_key_value_heads_of_grouped_queries():
    grouped = random_circuit(GROUPED, density=0.5)
    each = to_graph(grouped, JOINT)
    for writer, reader in JOINT.edges:
        shared = reader
        if reader[-2:] in (".k", ".v"):
            head = int(reader.split("h")[1][0])
            shared = reader.replace(f"h{head}", f"h{head // 2}")
        assert ((writer, reader) in each) == ((writer, shared) in grouped)
    assert to_graph(each, GROUPED) == grouped
    one = Circuit.from_edges(JOINT, [("m0", "a2.h1.v")])
    with pytest.raises(InputError, match=r"in layer 2 it keeps different edges into the value inputs .* head 0"):
        to_graph(one, GROUPED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["edges"].update({"a2.h0->a1.h0<q>": {}}), "an edge 'a2.h0->a1.h0<q>', which a graph of 3 layers"),
        (lambda v: v["edges"].update({"a0.h9->m1": {}}), "an edge 'a0.h9->m1'"),
        (lambda v: v["edges"].pop("m1->logits"), r"lacks 1 of \d+ edges, such as 'm1->logits'"),
        (lambda v: v["edges"]["m1->m2"].update(score=float("nan")), r"1 edge score\(s\) .* m1 -> m2 \(nan\)"),
        (lambda v: v["edges"]["m1->m2"].update(score="x"), '"edges" are malformed'),
        (lambda v: v["edges"]["m1->m2"].update(in_graph=1), "in_graph is 1, not true or false"),
        (lambda v: v["edges"]["m1->m2"].pop("score"), '"edges" are malformed'),
        (lambda v: v["nodes"]["m1"].update(neurons=[True]), "a circuit of neurons"),
        (lambda v: v["nodes"].pop("m1"), '"nodes" must have an object for each'),
        (lambda v: v["cfg"].update(parallel_attn_mlp=True), "attention and MLP run in parallel"),
        (lambda v: v["cfg"].pop("n_heads"), '"cfg" must give n_layers and n_heads'),
        (lambda v: v.update(edges=[]), '"edges" is no object'),
    ],
)
def test_wrong_eap_ig_files(change, message, tmp_path):
    value = full_form(JOINT)
    change(value)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"circuit file {path}: ")
    assert "\n" not in str(caught.value)


ROW = ["blocks.1.hook_q_input", [None, None, 3], "blocks.0.hook_mlp_out", [None]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ["blocks.1.hook_mlp_in", [None], "blocks.2.hook_mlp_out", [None]]], "m2 is not computed before m1"),
        ([ROW, ["blocks.1.hook_q_input", [None, None, 4], "hook_embed", [None]]], "no reader 'a1.h4.q'"),
        ([ROW, ["blocks.1.hook_q_input", [None], "hook_embed", [None]]], r"names no head; give \[null, null, head\]"),
        ([ROW, ["blocks.1.hook_z", [None], "hook_embed", [None]]], "'blocks.1.hook_z' reads nothing in a model of 3"),
        ([ROW, ["blocks.1.hook_resid_post", [None], "hook_embed", [None]]], "'blocks.1.hook_resid_post' reads nothing"),
        ([ROW, ["nothing", [None], "hook_embed", [None]]], "no hook 'nothing' is known"),
        ([ROW, ["blocks.1.hook_mlp_in", [None], "blocks.0.hook_resid_post", [None]]], "writes nothing into"),
        ([ROW, ["blocks.1.hook_mlp_in", "all", "hook_embed", [None]]], "row 2 is .* not .receiver hook, index"),
        ([ROW, [ROW, float("nan")]], "row 2 has the effect nan"),
        (
            [
                ["blocks.0.hook_mlp_in", [None], "hook_embed", [None]],
                ["blocks.1.hook_mlp_in", [None], "blocks.0.hook_resid_pre", [None]],
            ],
            "both as one sender and as two",
        ),
    ],
)
def test_wrong_acdc_lists(rows, message):
    with pytest.raises(InputError, match=message):
        parse(rows, SPLIT)


def test_files_of_another_model_and_of_none(real, tmp_path):
    with pytest.raises(InputError, match=r"over 12 layers of 12 heads .* this model has 3 layers of 4 heads"):
        read(REAL, JOINT)
    for rows in ([ROW], [["m0", "m1"]]):
        with pytest.raises(InputError, match="does not say which model it is of"):
            parse(rows)
    with pytest.raises(InputError, match=r"no known circuit \(found list\)|no known circuit \(found dict\)"):
        parse({"edges": {}})
    with pytest.raises(InputError, match="no circuit format 'dot'; formats: fastcircuit, edge-pruning, eap-ig, acdc"):
        write(tmp_path / "c", real.circuit, "dot")
    (tmp_path / "cut.json.gz").write_bytes(REAL.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"circuit file .*cut.json.gz cannot be read"):
        read(tmp_path / "cut.json.gz")
    with pytest.raises(InputError, match="scores cannot be taken"):
        write(tmp_path / "c", CircuitFile("x", random_circuit(SPLIT), np.zeros(SPLIT.num_edges)), "eap-ig")


def test_a_models_graph_takes_the_circuit_along(real):
    split = read(REAL, Graph(12, 12, 12, "split"))
    assert split.edge_scores is None
    assert to_graph(split.circuit, GPT2) == real.circuit

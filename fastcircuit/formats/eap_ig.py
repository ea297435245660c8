"""Graphs of EAP-IG and the MIB circuit track, as JSON: every edge with its score, and which are in the circuit.

    {"cfg": {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": false, "d_model": 768},
     "nodes": {"input": {"in_graph": true}, "a0.h0": {"in_graph": false}, ..., "logits": {"in_graph": true}},
     "edges": {"input->a0.h0<q>": {"score": -0.0003, "in_graph": false}, ...}}

or shorter, ``"edges": {"input->a0.h0<q>": -0.0003, ...}, "in_graph": ["input->a0.h1<q>", ...]``. The embeddings are one
writer, ``input``; every query head has key and value inputs of its own. Circuits of neurons are refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.formats.circuit_file import CircuitFile, check_scores
from fastcircuit.formats.conventions import to_graph
from fastcircuit.graph import FINAL_READ, Graph

_SIZES = ("n_layers", "n_heads")


def recognises(value: Any) -> bool:
    return isinstance(value, dict) and "cfg" in value and "edges" in value


def parse(value: Mapping[str, Any], graph: Graph | None) -> CircuitFile:
    """The graph that the file names, or the circuit over ``graph`` (without scores, if it counts edges otherwise)."""
    own = _graph(value["cfg"])
    names, ids = edge_names(own)
    edges = value["edges"]
    if not isinstance(edges, dict):
        raise InputError('its "edges" is no object of edges by name')
    _check_names(edges, names, own)
    short = "in_graph" in value
    keep, scores = np.zeros(own.num_edges, dtype=bool), np.zeros(own.num_edges)
    try:
        scores[ids] = [edges[name] if short else edges[name]["score"] for name in names]
        flags = set(value["in_graph"]) if short else {name for name in names if _flag(edges[name])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'its "edges" are malformed ({error!r}); each has a score and an in_graph flag') from None
    unknown = sorted(flags - set(names))
    if unknown:
        raise InputError(f'its "in_graph" names {unknown[0]!r}, which is no edge of {own.num_layers} layers')
    keep[ids] = [name in flags for name in names]
    check_scores([" -> ".join(edge) for edge in own.edges], scores, "edge")
    circuit = Circuit(own, keep, model={"hidden_size": value["cfg"]["d_model"]} if "d_model" in value["cfg"] else {})
    about = {"cfg": value["cfg"], "short": short, "nodes": value.get("nodes"), "circuit": circuit}
    file = CircuitFile("eap-ig", circuit, scores, _node_scores(value.get("nodes"), own), about)
    if graph is None or graph == own:
        return file
    return CircuitFile("eap-ig", to_graph(circuit, graph))


def dump(file: CircuitFile) -> dict[str, Any]:
    """The file as it was read, or a new one; edges without a score have 0, as in EAP-IG's own unscored graphs.

    EAP-IG ranks by size: instead of log-alphas, of which the most negative count least, their exponentials are written.
    """
    if file.log_alpha:
        edge, node = (None if scores is None else np.exp(scores) for scores in (file.edge_scores, file.node_scores))
        file = replace(file, edge_scores=edge, node_scores=node, log_alpha=False)
    circuit = file.circuit
    scored = file.edge_scores is not None
    own = Graph(circuit.graph.num_layers, circuit.graph.num_heads, circuit.graph.num_heads, "joint")
    if scored and circuit.graph != own:
        raise InputError(
            "scores cannot be taken to EAP-IG's graph (one input node, keys and values per query head); leave them out "
            "(convert --no-scores)"
        )
    names, ids = edge_names(own)
    keep = to_graph(circuit, own).keep[ids].tolist()
    scores = file.edge_scores[ids].tolist() if file.edge_scores is not None else [0.0] * len(names)
    cfg = file.about.get("cfg") or _cfg(circuit)
    if file.about.get("short"):
        kept = [name for name, flag in zip(names, keep, strict=True) if flag]
        return {"cfg": cfg, "edges": dict(zip(names, scores, strict=True)), "in_graph": kept}
    as_read = file.about.get("nodes") if file.about.get("circuit") == circuit else None
    flagged = zip(names, scores, keep, strict=True)
    return {
        "cfg": cfg,
        "nodes": as_read or _nodes(to_graph(circuit, own), file),
        "edges": {name: {"score": score, "in_graph": flag} for name, score, flag in flagged},
    }


def edge_names(graph: Graph) -> tuple[list[str], np.ndarray]:
    """EAP-IG's name of every edge in its order, and the edges' numbers in ours."""
    names, ids = zip(*_edges(graph), strict=True)
    return list(names), np.array(ids)


def _edges(graph: Graph) -> Iterator[tuple[str, int]]:
    """Layer by layer: into the heads, writer by writer, then into the MLP; last into the logits."""
    writers = [_node(name) for name in graph.writers]
    for site in graph.sites:
        numbers = site.view(np.arange(graph.num_edges))
        if site.num_readers == 1:
            reader = "logits" if site.name == FINAL_READ else site.name
            yield from ((f"{writers[w]}->{reader}", int(numbers[0, w])) for w in range(site.num_writers))
            continue
        for writer in range(site.num_writers):
            for head in range(graph.num_heads):
                for index, kind in enumerate("qkv"):
                    number = int(numbers[index * graph.num_heads + head, writer])
                    yield f"{writers[writer]}->a{site.layer}.h{head}<{kind}>", number


def _node(writer: str) -> str:
    return "input" if writer == "embeds" else writer


def _graph(cfg: Any) -> Graph:
    if not isinstance(cfg, dict) or not all(isinstance(cfg.get(name), int) for name in _SIZES):
        raise InputError('its "cfg" must give n_layers and n_heads as numbers')
    if cfg.get("parallel_attn_mlp"):
        raise InputError("it is of a model whose attention and MLP run in parallel, which is not supported")
    return Graph(cfg["n_layers"], cfg["n_heads"], cfg["n_heads"], "joint")


def _check_names(edges: Mapping[str, Any], names: list[str], graph: Graph) -> None:
    """InputError naming the first edge that the graph has not got, or that the file has not."""
    known = set(names)
    for name in edges:
        if name not in known:
            raise InputError(
                f"it has an edge {name!r}, which a graph of {graph.num_layers} layers of {graph.num_heads} heads has "
                "not (unknown, or against the order of computation)"
            )
    if len(edges) < len(names):
        missing = next(name for name in names if name not in edges)
        raise InputError(f"it lacks {len(names) - len(edges)} of {len(names)} edges, such as {missing!r}")


def _flag(edge: Any) -> bool:
    if not isinstance(edge["in_graph"], bool):
        raise ValueError(f"in_graph is {edge['in_graph']!r}, not true or false")
    return edge["in_graph"]


def _node_scores(nodes: Any, graph: Graph) -> np.ndarray | None:
    """Scores of the writers, if the file has them."""
    if nodes is None:
        return None
    names = [_node(name) for name in graph.writers]
    if not isinstance(nodes, dict) or not all(isinstance(nodes.get(name), dict) for name in names):
        raise InputError('its "nodes" must have an object for each of input, a0.h0, ..., m0, ...')
    if any("neurons" in node for node in nodes.values()):
        raise InputError("it is a circuit of neurons; circuits here are of heads and MLPs")
    if not all("score" in nodes[name] for name in names):
        return None
    try:
        scores = np.array([float(nodes[name]["score"]) for name in names])
    except (TypeError, ValueError) as error:
        raise InputError(f'its "nodes" have a score that is no number ({error})') from None
    check_scores(names, scores, "node")
    return scores


def _nodes(circuit: Circuit, file: CircuitFile) -> dict[str, dict[str, Any]]:
    """A node is in the graph when a kept edge reads it; so are the logits."""
    nodes: dict[str, dict[str, Any]] = {
        _node(name): {"in_graph": bool(kept)}
        for name, kept in zip(circuit.graph.writers, circuit.writer_kept, strict=True)
    }
    if file.node_scores is not None:
        for node, score in zip(nodes.values(), file.node_scores.tolist(), strict=True):
            node["score"] = score
    return {**nodes, "logits": {"in_graph": True}}


def _cfg(circuit: Circuit) -> dict[str, Any]:
    graph = circuit.graph
    size = {"d_model": circuit.model["hidden_size"]} if "hidden_size" in circuit.model else {}
    return {"n_layers": graph.num_layers, "n_heads": graph.num_heads, "parallel_attn_mlp": False, **size}

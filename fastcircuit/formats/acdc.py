"""Edge lists of ACDC, by TransformerLens hook names, the receiver first:

    [["blocks.3.hook_q_input", [null, null, 1], "blocks.0.attn.hook_result", [null, null, 2]], ...]

each perhaps with its effect, ``[[...], 0.013]`` (as ``save_edges`` has them). ACDC also has an edge from every input
hook to what is computed of it ("blocks.3.attn.hook_q" from "blocks.3.hook_q_input"); in a list that has any of these,
edges into an input without one are passed over, since nothing is computed of it. So are edges from ``hook_q``,
``hook_k`` and ``hook_v`` to ``hook_result``, which are always there. The embeddings are two senders (``hook_embed``,
``hook_pos_embed``) or one (``blocks.0.hook_resid_pre``).

Read, not written: the JSON of the Edge Pruning code's wrapper, ``{"original": [{"from": "head.0.2", "to":
"head.3.1.q"}, ...], "extra": [...]}``, in which embeddings are always kept.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.formats.circuit_file import CircuitFile
from fastcircuit.formats.conventions import to_graph
from fastcircuit.graph import FINAL_READ, EmbeddingNodes, Graph

_HOOK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
_EMBEDDINGS: dict[str, tuple[str, EmbeddingNodes]] = {
    "hook_embed": ("tok_embeds", "split"),
    "hook_pos_embed": ("pos_embeds", "split"),
    "blocks.0.hook_resid_pre": ("embeds", "joint"),
}
_COMPUTED = {"q": "q_input", "k": "k_input", "v": "v_input", "mlp_out": "mlp_in"}
Row = tuple[str, tuple[int | None, ...], str, tuple[int | None, ...]]


def recognises(value: Any) -> bool:
    """The wrapper's JSON, or a list of rows of four, with an effect or without."""
    if isinstance(value, dict):
        return "original" in value
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or not value[0]:
        return False
    return len(value[0]) == 4 or isinstance(value[0][0], list)


def parse(value: Any, graph: Graph | None) -> CircuitFile:
    """The circuit over ``graph``."""
    if graph is None:
        raise InputError(
            "an ACDC list does not say which model it is of; name it (convert --model, evaluate --embedding-nodes)"
        )
    if isinstance(value, dict):
        own = dataclasses.replace(graph, num_kv_heads=graph.num_heads, embedding_nodes="none")
        return CircuitFile("acdc", to_graph(Circuit.from_edges(own, list(_wrapper_edges(value))), graph))
    effects = dict(_row(item, number) for number, item in enumerate(value, start=1))
    counted = {_EMBEDDINGS[row[2]][1] for row in effects if row[2] in _EMBEDDINGS}
    if len(counted) > 1:
        raise InputError("it has the embeddings both as one sender and as two; it must be one way")
    nodes = counted.pop() if counted else graph.embedding_nodes
    own = dataclasses.replace(graph, num_kv_heads=graph.num_heads, embedding_nodes=nodes)
    circuit = to_graph(Circuit.from_edges(own, _edges(effects, own)), graph)
    return CircuitFile("acdc", circuit, about={"effects": effects, "circuit": circuit})


def dump(file: CircuitFile) -> list[Any]:
    """The rows as they were read, or those of the kept edges with the edges to what is computed of their readers."""
    if file.about.get("circuit") == file.circuit:
        effects = file.about["effects"]
    else:
        graph = file.circuit.graph
        if graph.embedding_nodes == "none":
            raise InputError("ACDC's lists name the embeddings' edges, and over embedding nodes 'none' there are none")
        own = dataclasses.replace(graph, num_kv_heads=graph.num_heads)
        effects = dict.fromkeys(_rows(to_graph(file.circuit, own)))
    rows = [[receiver, list(into), sender, list(of)] for receiver, into, sender, of in effects]
    if all(effect is None for effect in effects.values()):
        return rows
    return [list(pair) for pair in zip(rows, effects.values(), strict=True)]


def _row(item: Any, number: int) -> tuple[Row, float | None]:
    """One row of a list, and its effect if it has one."""
    effect = None
    if isinstance(item, list) and len(item) == 2:
        item, effect = item
    if effect is not None and not (isinstance(effect, (int, float)) and effect == effect):
        raise InputError(f"row {number} has the effect {effect!r}, which is no number")
    shaped = isinstance(item, list) and len(item) == 4 and all(isinstance(item[i], str) for i in (0, 2))
    if not shaped or not all(_is_index(item[i]) for i in (1, 3)):
        raise InputError(f"row {number} is {item!r}, not [receiver hook, index, sender hook, index]")
    return (item[0], tuple(item[1]), item[2], tuple(item[3])), effect


def _is_index(value: Any) -> bool:
    return isinstance(value, list) and all(part is None or isinstance(part, int) for part in value)


def _edges(rows: dict[Row, float | None], graph: Graph) -> list[tuple[str, str]]:
    """Named edges of the rows into input hooks of which something is computed."""
    computed = set()
    edges = []
    for row in rows:
        receiver, into, sender, of = row
        layer, hook = _hook(receiver, row)
        if hook in _COMPUTED:
            computed.add((layer, _COMPUTED[hook], into))
        elif hook == "result":
            continue
        else:
            edges.append(((layer, hook, into), (_writer(sender, of, row), _reader(layer, hook, into, graph, row))))
    return [edge for key, edge in edges if key[1] == "resid_post" or key in computed or not computed]


def _hook(name: str, row: Row) -> tuple[int, str]:
    """Layer and hook; the input of an MLP is "mlp_in" whatever the version of ACDC calls it."""
    match = _HOOK.fullmatch(name)
    if match is None:
        raise InputError(f"row {_show(row)}: no hook {name!r} is known")
    return int(match[1]), "mlp_in" if match[2] == "resid_mid" else match[2]


def _writer(sender: str, of: tuple[int | None, ...], row: Row) -> str:
    if sender in _EMBEDDINGS:
        return _EMBEDDINGS[sender][0]
    layer, hook = _hook(sender, row)
    if hook == "mlp_out":
        return f"m{layer}"
    if hook != "result":
        raise InputError(f"row {_show(row)}: {sender!r} writes nothing into the residual stream")
    return f"a{layer}.h{_head(of, row)}"


def _reader(layer: int, hook: str, into: tuple[int | None, ...], graph: Graph, row: Row) -> str:
    if hook == "resid_post" and layer == graph.num_layers - 1:
        return FINAL_READ
    if hook == "mlp_in":
        return f"m{layer}"
    if hook not in ("q_input", "k_input", "v_input"):
        raise InputError(f"row {_show(row)}: {row[0]!r} reads nothing in a model of {graph.num_layers} layers")
    return f"a{layer}.h{_head(into, row)}.{hook[0]}"


def _head(index: tuple[int | None, ...], row: Row) -> int:
    if len(index) != 3 or index[2] is None:
        raise InputError(f"row {_show(row)}: the index {list(index)} names no head; give [null, null, head]")
    return index[2]


def _show(row: Row) -> str:
    receiver, into, sender, of = row
    return f"{receiver}{list(into)} <- {sender}{list(of)}"


def _wrapper_edges(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Edges of the wrapper's JSON, renamed: ``head.3.1.q`` is ``a3.h1.q``, ``mlp.3`` is ``m3``."""
    edges = value["original"]
    if not isinstance(edges, list):
        raise InputError('its "original" is no list of {"from": ..., "to": ...}')
    for number, edge in enumerate(edges, start=1):
        if not isinstance(edge, dict) or not all(isinstance(edge.get(end), str) for end in ("from", "to")):
            raise InputError(f'edge {number} of its "original" is {edge!r}, not {{"from": ..., "to": ...}}')
        yield _renamed(edge["from"]), _renamed(edge["to"])


def _renamed(name: str) -> str:
    return re.sub(r"^head\.(\d+)\.(\d+)", r"a\1.h\2", re.sub(r"^mlp\.", "m", name))


def _rows(circuit: Circuit) -> Iterator[Row]:
    """For each reader in turn, the row to what is computed of it, then those of its edges."""
    senders = {name: hook for hook, (name, _) in _EMBEDDINGS.items()}
    last = None
    for writer, reader in circuit.edges:
        layer, head, kind = re.fullmatch(r"[am](\d+)(?:\.h(\d+)\.([qkv]))?|resid_post", reader).groups()  # type: ignore[union-attr]
        into: tuple[int | None, ...] = (None,) if head is None else (None, None, int(head))
        if layer is None:
            receiver = f"blocks.{circuit.graph.num_layers - 1}.hook_resid_post"
        else:
            receiver = f"blocks.{layer}.hook_{kind}_input" if kind else f"blocks.{layer}.hook_mlp_in"
            if reader != last:
                yield (
                    f"blocks.{layer}.attn.hook_{kind}" if kind else f"blocks.{layer}.hook_mlp_out",
                    into,
                    receiver,
                    into,
                )
        last = reader
        if writer in senders:
            yield receiver, into, senders[writer], (None,)
            continue
        layer, head = re.fullmatch(r"[am](\d+)(?:\.h(\d+))?", writer).groups()  # type: ignore[union-attr]
        of: tuple[int | None, ...] = (None,) if head is None else (None, None, int(head))
        yield receiver, into, f"blocks.{layer}.attn.hook_result" if head else f"blocks.{layer}.hook_mlp_out", of

"""Which nodes a drawing has: the components of the model that a circuit touches, and where each reader lands.

One kept edge is drawn as one line, so every reader belongs to exactly one node:

* a query reader belongs to its head, an MLP's reader to the MLP, the final read to the output;
* with as many key/value heads as query heads, ``a1.h0.k`` and ``a1.h0.v`` belong to head ``a1.h0`` too;
* under grouped-query attention ``a1.h0.k`` reads for a *key/value head* that all query heads of its group share. It
  gets a node of its own, ``a1.kv0``, standing left of the group's heads inside one outline. Attaching the line to a
  head would claim that the other heads do not get it; drawing it once per head would show edges that do not exist.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.graph import FINAL_READ, Graph

ReaderKind = Literal["q", "k", "v", "mlp", "output"]
READER_KINDS: tuple[ReaderKind, ...] = ("q", "k", "v", "mlp", "output")
NodeKind = Literal["embedding", "head", "kv", "mlp", "output"]


@dataclass(frozen=True)
class Component:
    """One possible node: its name, the writer it is (if it writes) and the readers that land on it.

    ``layer`` is -1 for embeddings and ``graph.num_layers`` for the output. ``group`` numbers the key/value group of a
    head or key/value node within its layer (each head is its own group without grouped-query attention).
    """

    name: str
    kind: NodeKind
    layer: int
    writer: int | None = None
    readers: tuple[int, ...] = ()
    group: int = 0

    @property
    def row(self) -> tuple[int, int]:
        """Sort key of the row it stands in, bottom first: a layer's MLP stands above its attention heads."""
        return self.layer, int(self.kind == "mlp")


def components(graph: Graph) -> list[Component]:
    """Every component of ``graph``, in computation order; a key/value node stands just before its group's heads."""
    found = [Component(graph.writers[i], "embedding", -1, writer=i) for i in range(graph.num_embedding_writers)]
    for layer in range(graph.num_layers):
        found += _attention(graph, layer)
        reader = graph.mlp_site(layer).first_reader
        found.append(Component(f"m{layer}", "mlp", layer, graph.mlp_writer(layer), (reader,)))
    found.append(Component(FINAL_READ, "output", graph.num_layers, readers=(graph.final_site.first_reader,)))
    return found


def _attention(graph: Graph, layer: int) -> list[Component]:
    first = graph.attention_site(layer).first_reader
    group_size = graph.num_heads // graph.num_kv_heads
    found = []
    for head in range(graph.num_heads):
        group = head // group_size
        key = first + graph.num_heads + group
        shared = (key, key + graph.num_kv_heads)
        if group_size > 1 and head % group_size == 0:
            found.append(Component(f"a{layer}.kv{group}", "kv", layer, readers=shared, group=group))
        readers = (first + head, *(shared if group_size == 1 else ()))
        found.append(Component(f"a{layer}.h{head}", "head", layer, graph.head_writer(layer, head), readers, group))
    return found


def touched(circuit: Circuit, candidates: list[Component]) -> np.ndarray:
    """Bool per component: some kept edge starts or ends there."""
    read = np.zeros(circuit.graph.num_readers, dtype=bool)
    read[circuit.graph.edge_readers[circuit.keep]] = True
    return np.array(
        [
            (item.writer is not None and bool(circuit.writer_kept[item.writer])) or bool(read[list(item.readers)].any())
            for item in candidates
        ]
    )


def drawn(circuit: Circuit) -> tuple[list[Component], np.ndarray]:
    """The components to draw and whether each is touched.

    Heads and MLPs that no edge touches are left out, except in an empty circuit, which shows the whole skeleton. The
    ends of the stream are always there.
    """
    every = components(circuit.graph)
    alive = touched(circuit, every)
    always = np.array([item.kind in ("embedding", "output") for item in every])
    shown = alive | always | (not circuit.num_edges)
    return [item for item, show in zip(every, shown, strict=True) if show], alive[shown]


def reader_kinds(graph: Graph) -> list[ReaderKind]:
    """The type of every reader, in reader order."""
    suffixes: dict[str, ReaderKind] = {"q": "q", "k": "k", "v": "v"}
    return ["output" if name == FINAL_READ else suffixes.get(name.rpartition(".")[2], "mlp") for name in graph.readers]

"""Circuit: a set of kept edges over a graph, its file format and its set algebra."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fastcircuit.errors import InputError
from fastcircuit.files import write_json
from fastcircuit.graph import EMBEDDING_NODES, FINAL_READ, Graph

FORMAT = "fastcircuit.circuit/1"
Ablation = Literal["interchange", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("interchange", "mean", "zero")
OUTPUT_BIAS = ("split", "kept")


@dataclass(frozen=True, eq=False)
class Circuit:
    """The edges of ``graph`` that are kept; every other edge carries the ablated activation.

    Args:
        graph: the graph the edges belong to.
        keep: bool ``[num_edges]`` in the order of ``graph.edges``.
        model: what the circuit was found in (``name``, ``architecture``, ``hidden_size``, ``vocab_size``).
        task: name of the task it explains.
        ablation: what a removed edge carries: ``interchange``, ``mean`` or ``zero``.
        output_bias: under zero ablation, ``split`` (1/H of b_O goes with each head) or ``kept``.
        metrics: numbers measured for it.
        provenance: how it was found (method, settings, seed, versions).
    """

    graph: Graph
    keep: np.ndarray
    model: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    ablation: Ablation = "interchange"
    output_bias: str = "split"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep = np.array(self.keep, dtype=bool)
        if keep.shape != (self.graph.num_edges,):
            raise InputError(f"a circuit over this graph needs {self.graph.num_edges} flags, got shape {keep.shape}")
        for name, accepted in (("ablation", ABLATIONS), ("output_bias", OUTPUT_BIAS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        keep.setflags(write=False)
        object.__setattr__(self, "keep", keep)

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[tuple[str, str]], **about: Any) -> "Circuit":
        """The circuit of the named ``(writer, reader)`` edges; InputError names an edge the graph has not got."""
        keep = np.zeros(graph.num_edges, dtype=bool)
        for edge in edges:
            if not isinstance(edge, (list, tuple)) or len(edge) != 2 or not all(isinstance(end, str) for end in edge):
                raise InputError(f"edge {edge!r} is not a [writer, reader] pair of names")
            keep[graph.edge_id(*edge)] = True
        return cls(graph, keep, **about)

    @classmethod
    def full(cls, graph: Graph, **about: Any) -> "Circuit":
        """All edges: the model itself."""
        return cls(graph, np.ones(graph.num_edges, dtype=bool), **about)

    @property
    def keeps_output_bias(self) -> bool:
        """Whether a removed head leaves b_O behind; under interchange and mean ablation it makes no difference."""
        return self.ablation == "zero" and self.output_bias == "kept"

    @property
    def num_edges(self) -> int:
        """Number of kept edges."""
        return int(self.keep.sum())

    @property
    def sparsity(self) -> float:
        """Fraction of the graph's edges that is removed, in [0, 1]."""
        return 1.0 - self.num_edges / self.graph.num_edges

    @cached_property
    def edges(self) -> list[tuple[str, str]]:
        """Kept ``(writer, reader)`` pairs in canonical order."""
        graph, kept = self.graph, np.flatnonzero(self.keep)
        return [(graph.writers[graph.edge_writers[e]], graph.readers[graph.edge_readers[e]]) for e in kept]

    @cached_property
    def writer_kept(self) -> np.ndarray:
        """Bool ``[num_writers]``: the writers that some kept edge reads from."""
        kept = np.zeros(self.graph.num_writers, dtype=bool)
        kept[self.graph.edge_writers[self.keep]] = True
        return kept

    @property
    def nodes(self) -> list[str]:
        """Names of the writers that some kept edge reads from, in stream order."""
        return [name for name, kept in zip(self.graph.writers, self.writer_kept, strict=True) if kept]

    def pruned(self) -> "Circuit":
        """Without the edges that cannot matter.

        Edges into a component that no kept path joins to the output go, whatever the ablation. Under interchange
        ablation so do the edges out of a component that reads nothing clean: fed only with corrupted activations, it
        writes its corrupted activation, as if the edge were removed. The masked model's output does not change.
        """
        keep = _drop_unread(self.graph, self.keep)
        if self.ablation == "interchange" and self.graph.embedding_nodes != "none":
            keep = _drop_unfed(self.graph, keep)
        return dataclasses.replace(self, keep=_drop_unread(self.graph, keep))

    def _combine(self, other: "Circuit", keep: np.ndarray) -> "Circuit":
        return Circuit(self.graph, keep, self.model, self.task, self.ablation, self.output_bias)

    def _same_graph(self, other: "Circuit") -> "Circuit":
        if self.graph != other.graph:
            raise InputError(
                f"the circuits are over different graphs: {self.graph}, and {other.graph}; give two of one model"
            )
        return other

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, self.keep & self._same_graph(other).keep)

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, self.keep | self._same_graph(other).keep)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, self.keep & ~self._same_graph(other).keep)

    def __xor__(self, other: "Circuit") -> "Circuit":
        return self._combine(other, self.keep ^ self._same_graph(other).keep)

    def __le__(self, other: "Circuit") -> bool:
        return not (self - other).num_edges

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and np.array_equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash((self.graph, self.keep.tobytes()))

    def __contains__(self, edge: tuple[str, str]) -> bool:
        return bool(self.keep[self.graph.edge_id(*edge)])

    def __repr__(self) -> str:
        return (
            f"Circuit({self.num_edges} of {self.graph.num_edges} edges, {len(self.nodes)} writers, task={self.task!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``circuit.json`` (format ``fastcircuit.circuit/1``)."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "graph": dataclasses.asdict(self.graph),
            "task": self.task,
            "ablation": self.ablation,
            "output_bias": self.output_bias,
            "edges": [list(edge) for edge in self.edges],
            "nodes": self.nodes,
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], graph: Graph | None = None) -> "Circuit":
        """Read a ``circuit.json``, or a circuit in another tool's file (see :mod:`fastcircuit.formats`).

        Args:
            graph: the model's, for files that do not say what they are of, and to check or convert the others.

        Raises:
            InputError: no such file, not a circuit, or a circuit of another graph than ``graph``.
        """
        from fastcircuit.formats import read

        return read(path, graph, scores=False).circuit

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Circuit":
        """The circuit that :meth:`to_dict` wrote."""
        fields = ("graph", "model", "task", "ablation", "edges", "nodes", "metrics", "provenance")
        missing = [name for name in fields if name not in value]
        if missing:
            raise InputError(f"it has no {', '.join(repr(name) for name in missing)}")
        about = {name: value[name] for name in ("model", "task", "ablation", "metrics", "provenance")}
        about["output_bias"] = value.get("output_bias", "split")  # which older files do not name
        for name in ("model", "metrics", "provenance"):
            if not isinstance(value[name], dict):
                raise InputError(f'its "{name}" is not an object but {value[name]!r:.40}')
        return cls.from_edges(_graph_from_dict(value["graph"]), _checked_edges(value["edges"]), **about)

    def save_edge_list(self, path: str | os.PathLike[str]) -> None:
        """Write the Edge Pruning code's ``edges.json``: a list of ``[writer, reader]``."""
        from fastcircuit.formats import write

        write(path, self, "edge-pruning")


def _checked_edges(edges: Any) -> list[Any]:
    if not isinstance(edges, list):
        raise InputError('its "edges" is not a list of [writer, reader] pairs')
    return edges


def _graph_from_dict(value: Any) -> Graph:
    names = [item.name for item in dataclasses.fields(Graph)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        raise InputError(f'its "graph" must have exactly {", ".join(names)}')
    numbers = [value[name] for name in names if name != "embedding_nodes"]
    if not all(isinstance(number, int) for number in numbers) or value["embedding_nodes"] not in EMBEDDING_NODES:
        raise InputError(f'its "graph" is malformed: {value}')
    return Graph(**value)


def _drop_unread(graph: Graph, keep: np.ndarray) -> np.ndarray:
    """Drop edges into readers whose component has no kept path to the final read."""
    return keep & graph.live(keep)[1][graph.edge_readers]


def _drop_unfed(graph: Graph, keep: np.ndarray) -> np.ndarray:
    """Drop edges out of heads and MLPs none of whose readers has a kept edge, first component first."""
    keep = keep.copy()
    fed = np.zeros(graph.num_writers, dtype=bool)
    fed[: graph.num_embedding_writers] = True
    feeds_of = _group(graph.feeds[0], graph.feeds[1], graph.num_readers)
    for site in graph.sites:
        block = keep[site.edge_slice].reshape(site.num_readers, site.num_writers)
        block &= fed[: site.num_writers]
        if site.name != FINAL_READ:
            for row in np.flatnonzero(block.any(axis=1)):
                fed[feeds_of[site.first_reader + row]] = True
    return keep


def _group(keys: np.ndarray, values: np.ndarray, num_keys: int) -> list[np.ndarray]:
    """``values`` grouped by key: entry k holds the values whose key is k."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.searchsorted(keys[order], np.arange(1, num_keys)))

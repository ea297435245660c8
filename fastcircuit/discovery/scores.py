"""A score for every edge and writer, and the circuits that follow from it."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcircuit.circuit import Ablation, Circuit
from fastcircuit.discovery.rounding import check_num_edges, top_circuit
from fastcircuit.errors import InputError, RunError
from fastcircuit.formats import read, score_file
from fastcircuit.graph import FINAL_READ, Graph


@dataclass(frozen=True)
class Scores:
    """How much each edge and writer matters: the rise of the loss when it is removed, measured or estimated.

    Args:
        edge: float64 ``[num_edges]`` in the order of ``graph.edges``.
        node: float64 ``[num_writers]`` in the order of ``graph.writers``.
        ablation, output_bias: what a removed edge carries (see ``evaluation.reference``).
        log_alpha: the scores are Edge Pruning's log-alphas, of which the lowest are removed first, not the smallest.
        seconds: that computing them took, if that is known.

    Raises:
        InputError: a wrong shape, or a score that is NaN.
    """

    graph: Graph
    edge: np.ndarray
    node: np.ndarray
    ablation: Ablation = "interchange"
    output_bias: str = "split"
    log_alpha: bool = False
    seconds: float | None = None

    def __post_init__(self) -> None:
        names = {"edge": self.graph.num_edges, "node": self.graph.num_writers}
        for name, size in names.items():
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != (size,):
                raise InputError(
                    f"{name} scores have shape {values.shape}; this graph needs ({size},); give scores of this model"
                )
            object.__setattr__(self, name, values)
        check_finite(self.graph, self.edge)
        if np.isnan(self.node).any():
            raise InputError(f"the score of writer {self.graph.writers[int(np.isnan(self.node).argmax())]} is NaN")

    def ranking(self, absolute: bool = True) -> np.ndarray:
        """What edges are ordered by, ``[num_edges]``: the score's size, or the score itself."""
        return score_file.ranked(self.edge, absolute, self.log_alpha)

    def node_ranking(self, absolute: bool = True) -> np.ndarray:
        """What writers are ordered by, ``[num_writers]``."""
        return score_file.ranked(self.node, absolute, self.log_alpha)

    def circuit(
        self,
        edges: int | None = None,
        threshold: float | None = None,
        *,
        absolute: bool = True,
        pruned: bool = True,
    ) -> Circuit:
        """The best edges: exactly ``edges`` of them, or all that score at least ``threshold``.

        Args:
            absolute: rank by the size of a score; otherwise an edge that stands in the way (negative) comes last.
            pruned: edges that cannot matter (see :meth:`Circuit.pruned`) do not count and are not kept.

        Raises:
            InputError: neither or both of ``edges`` and ``threshold``, or more edges than the graph has.
        """
        if (edges is None) == (threshold is None):
            raise InputError("give edges or threshold, one of them")
        ranking = self.ranking(absolute)
        if threshold is not None:
            return self._circuit(ranking >= threshold, pruned)
        assert edges is not None
        check_num_edges(self.graph, edges)
        if pruned:
            return self._circuit(top_circuit(self.graph, ranking, edges, self.ablation).keep)
        return self.top(edges, absolute=absolute)

    def top(self, edges: int, *, absolute: bool = True) -> Circuit:
        """The ``edges`` best edges and no others, whether they can matter or not; there may be 0 of them."""
        return self._circuit(score_file.best(self.ranking(absolute), edges))

    def node_circuit(self, nodes: int, *, absolute: bool = True, pruned: bool = True) -> Circuit:
        """The circuit of the ``nodes`` best writers: every edge that leads from one of them to another or the output.

        Raises:
            InputError: more writers than the graph has.
        """
        graph = self.graph
        if not 1 <= nodes <= graph.num_writers:
            raise InputError(f"nodes is {nodes}; this model has 1 to {graph.num_writers} writers to keep")
        kept = score_file.best(self.node_ranking(absolute), nodes)
        readers = np.zeros(graph.num_readers, dtype=bool)
        readers[graph.reader_id(FINAL_READ)] = True
        fed_by, feeds = graph.feeds
        readers[fed_by[kept[feeds]]] = True
        keep = kept[graph.edge_writers] & readers[graph.edge_readers]
        return self._circuit(keep, pruned)

    def _circuit(self, keep: np.ndarray, pruned: bool = False) -> Circuit:
        circuit = Circuit(self.graph, keep, ablation=self.ablation, output_bias=self.output_bias)
        return circuit.pruned() if pruned else circuit

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``edge`` and ``node`` as safetensors."""
        score_file.save(path, score_file.ScoreFile(self.edge, self.node, self.log_alpha, self.seconds))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        graph: Graph,
        ablation: Ablation = "interchange",
        output_bias: str = "split",
    ) -> "Scores":
        """Read what :meth:`save` wrote, a discovery's ``masks.safetensors``, or a scored circuit, ``.json[.gz]``.

        Writers without scores of their own get the sums of their edges' (see :func:`node_scores`).

        Raises:
            InputError: no such file, no scores in it, scores of another graph, or a score that is NaN.
        """
        found = _of_circuit(path, graph) if Path(path).suffix in (".json", ".gz") else score_file.load(path)
        try:
            check_finite(graph, found.edge)
            node = node_scores(graph, found.edge) if found.node is None else found.node
            return cls(graph, found.edge, node, ablation, output_bias, found.log_alpha, found.seconds)
        except InputError as error:
            raise InputError(f"scores file {path}: {error}") from None


def _of_circuit(path: str | os.PathLike[str], graph: Graph) -> score_file.ScoreFile:
    """The scores that a circuit of this or another tool has over ``graph``."""
    file = read(path, graph)
    if file.edge_scores is None:
        raise InputError(
            f"circuit file {path} holds no scores over {graph}; give one that does, or masks.safetensors "
            "(scores are not taken from one way to count embeddings to another: --embedding-nodes)"
        )
    return score_file.ScoreFile(file.edge_scores, file.node_scores, file.log_alpha)


def node_scores(graph: Graph, edge: np.ndarray) -> np.ndarray:
    """Scores of writers to first order: a writer's gradient is the sum of its readers', so its score is its edges'."""
    return np.bincount(graph.edge_writers, weights=edge, minlength=graph.num_writers)


def check_finite(graph: Graph, edge: np.ndarray) -> None:
    """InputError naming the first edge whose score is NaN."""
    wrong = np.isnan(edge)
    if wrong.any():
        first = int(wrong.argmax())
        writer, reader = graph.writers[graph.edge_writers[first]], graph.readers[graph.edge_readers[first]]
        raise InputError(
            f"{int(wrong.sum())} edge scores are NaN, the first of {writer} -> {reader}; compute them again"
        )


def check_computed(graph: Graph, edge: np.ndarray) -> None:
    """RunError when a computation gave scores that are not finite."""
    if not np.isfinite(edge).all():
        first = int((~np.isfinite(edge)).argmax())
        name = f"{graph.writers[graph.edge_writers[first]]} -> {graph.readers[graph.edge_readers[first]]}"
        raise RunError(f"the score of edge {name} came out as {edge[first]}; use a wider dtype; nothing was saved")

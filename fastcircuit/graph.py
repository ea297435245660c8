"""The computational graph of a transformer: writers, readers, edges, and how they are numbered. Pure integers.

Writers add to the residual stream: the embeddings, every attention head, every MLP. Readers take from it: a head's
query, key or value input, an MLP's input, the final read before the unembedding. There is an edge from a writer to
every reader that comes after it (Edge Pruning, section 2).

Edges are numbered reader by reader, in the order the model computes them, and for one reader writer by writer. So the
readers that read at one place (a *site*: all q, k, v inputs of a layer; one MLP; the final read) own one contiguous
``[R, w]`` block of every per-edge vector.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fastcircuit.errors import InputError

EmbeddingNodes = Literal["split", "joint", "none"]
EMBEDDING_NODES: tuple[EmbeddingNodes, ...] = ("split", "joint", "none")
FINAL_READ = "resid_post"
# Twice those of the largest open Llama: a damaged file that names more would fill the memory with edges.
MOST_HEADS = 2**15


@dataclass(frozen=True)
class Site:
    """One place where the stream is read: ``num_readers`` readers that all see the first ``num_writers`` writers."""

    name: str
    layer: int
    first_reader: int
    num_readers: int
    num_writers: int
    first_edge: int

    @property
    def num_edges(self) -> int:
        return self.num_readers * self.num_writers

    @property
    def edge_slice(self) -> slice:
        return slice(self.first_edge, self.first_edge + self.num_edges)

    def view(self, per_edge: Any) -> Any:
        """The ``[num_readers, num_writers]`` block of a per-edge vector (torch tensor or numpy array), not a copy."""
        return per_edge[self.edge_slice].reshape(self.num_readers, self.num_writers)


@dataclass(frozen=True)
class Graph:
    """Writers, readers and edges of a decoder with ``num_layers`` blocks of attention then MLP.

    Args:
        num_layers: number of blocks.
        num_heads: query heads per block; each is one writer and one query reader.
        num_kv_heads: key/value heads per block; each is one key reader and one value reader.
        embedding_nodes: ``split`` (token and position embeddings are two writers), ``joint`` (one input writer) or
            ``none`` (the embeddings are always kept and are no writer).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embedding_nodes: EmbeddingNodes = "split"

    def __post_init__(self) -> None:
        if self.embedding_nodes not in EMBEDDING_NODES:
            raise InputError(f"embedding_nodes is {self.embedding_nodes!r}; accepted: {', '.join(EMBEDDING_NODES)}")
        if min(self.num_layers, self.num_heads, self.num_kv_heads) < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(
                f"a graph needs at least one layer and head, and heads divisible by kv heads; got {self.num_layers} "
                f"layers, {self.num_heads} heads, {self.num_kv_heads} kv heads"
            )
        if self.num_layers * self.num_heads > MOST_HEADS:
            raise InputError(
                f"a graph of {self.num_layers} layers of {self.num_heads} heads is too large; at most {MOST_HEADS} "
                f"heads are accepted"
            )

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.num_heads} heads ({self.num_kv_heads} key/value heads), embedding "
            f"nodes {self.embedding_nodes!r}"
        )

    @classmethod
    def from_config(cls, config: Any, embedding_nodes: EmbeddingNodes = "split") -> "Graph":
        """The graph of a Hugging Face config. Models without a position table have one embedding writer, not two."""
        heads = config.num_attention_heads
        if embedding_nodes == "split" and getattr(config, "rope_parameters", None) is not None:
            embedding_nodes = "joint"
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, heads, kv_heads, embedding_nodes)

    @property
    def num_embedding_writers(self) -> int:
        return {"split": 2, "joint": 1, "none": 0}[self.embedding_nodes]

    @property
    def num_writers(self) -> int:
        return self.num_embedding_writers + self.num_layers * (self.num_heads + 1)

    @property
    def num_readers(self) -> int:
        return self.num_layers * (self.num_heads + 2 * self.num_kv_heads + 1) + 1

    @property
    def num_edges(self) -> int:
        last = self.sites[-1]
        return last.first_edge + last.num_edges

    def head_writer(self, layer: int, head: int = 0) -> int:
        """Row of head ``head`` of ``layer`` in the stream."""
        return self.num_embedding_writers + layer * (self.num_heads + 1) + head

    def mlp_writer(self, layer: int) -> int:
        """Row of the MLP of ``layer`` in the stream."""
        return self.head_writer(layer, self.num_heads)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites in computation order: attention and MLP of every layer, then the final read."""
        sites: list[Site] = []
        reader = edge = 0
        attention_readers = self.num_heads + 2 * self.num_kv_heads
        for layer in range(self.num_layers):
            for name, readers, writers in (
                (f"a{layer}", attention_readers, self.head_writer(layer)),
                (f"m{layer}", 1, self.mlp_writer(layer)),
            ):
                sites.append(Site(name, layer, reader, readers, writers, edge))
                reader += readers
                edge += readers * writers
        sites.append(Site(FINAL_READ, self.num_layers, reader, 1, self.num_writers, edge))
        return tuple(sites)

    def attention_site(self, layer: int) -> Site:
        return self.sites[2 * layer]

    def mlp_site(self, layer: int) -> Site:
        return self.sites[2 * layer + 1]

    @property
    def final_site(self) -> Site:
        return self.sites[-1]

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers in stream order: ``tok_embeds``, ``pos_embeds`` (or ``embeds``), ``a0.h0``, ``m0``."""
        embeddings = {"split": ("tok_embeds", "pos_embeds"), "joint": ("embeds",), "none": ()}[self.embedding_nodes]
        blocks = (
            name
            for layer in range(self.num_layers)
            for name in (*(f"a{layer}.h{head}" for head in range(self.num_heads)), f"m{layer}")
        )
        return (*embeddings, *blocks)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers: ``a0.h0.q`` ..., ``a0.h0.k`` ... (per key/value head), ``a0.h0.v`` ..., ``m0``."""
        names: list[str] = []
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}.q" for head in range(self.num_heads)]
            names += [f"a{layer}.h{head}.k" for head in range(self.num_kv_heads)]
            names += [f"a{layer}.h{head}.v" for head in range(self.num_kv_heads)]
            names.append(f"m{layer}")
        return (*names, FINAL_READ)

    @cached_property
    def edge_writers(self) -> np.ndarray:
        """Writer of every edge, int32 ``[num_edges]``."""
        rows = [np.tile(np.arange(site.num_writers, dtype=np.int32), site.num_readers) for site in self.sites]
        return np.concatenate(rows)

    @cached_property
    def edge_readers(self) -> np.ndarray:
        """Reader of every edge, int32 ``[num_edges]``."""
        rows = [
            np.repeat(
                np.arange(site.first_reader, site.first_reader + site.num_readers, dtype=np.int32), site.num_writers
            )
            for site in self.sites
        ]
        return np.concatenate(rows)

    @cached_property
    def edges(self) -> list[tuple[str, str]]:
        """``(writer, reader)`` names of every edge in canonical order."""
        writers = np.array(self.writers, dtype=object)[self.edge_writers]
        readers = np.array(self.readers, dtype=object)[self.edge_readers]
        return list(zip(writers.tolist(), readers.tolist(), strict=True))

    @cached_property
    def _reader_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """First edge and number of writers of every reader."""
        first = [site.first_edge + row * site.num_writers for site in self.sites for row in range(site.num_readers)]
        writers = [site.num_writers for site in self.sites for _ in range(site.num_readers)]
        return np.array(first), np.array(writers)

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.writers)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    def writer_id(self, name: str) -> int:
        """Number of the writer called ``name``; InputError if this graph has none."""
        if name not in self._writer_index:
            raise InputError(f"no writer {name!r} in this graph; writers are {_abridged(self.writers)}")
        return self._writer_index[name]

    def reader_id(self, name: str) -> int:
        """Number of the reader called ``name``; InputError if this graph has none."""
        if name not in self._reader_index:
            raise InputError(f"no reader {name!r} in this graph; readers are {_abridged(self.readers)}")
        return self._reader_index[name]

    def edge_id(self, writer: str, reader: str) -> int:
        """Number of the edge ``writer -> reader``; InputError if the writer does not come before the reader."""
        row, column = self.reader_id(reader), self.writer_id(writer)
        first, writers = self._reader_edges
        if column >= writers[row]:
            raise InputError(f"no edge {writer} -> {reader}: {writer} is not computed before {reader}")
        return int(first[row]) + column

    @cached_property
    def feeds(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs ``(reader, writer)`` where the reader is an input of the writer, in computation order.

        A key or value reader of grouped-query attention feeds every head of its group.
        """
        pairs: list[tuple[int, int]] = []
        group = self.num_heads // self.num_kv_heads
        for layer in range(self.num_layers):
            start = self.attention_site(layer).first_reader
            for head in range(self.num_heads):
                writer, kv = self.head_writer(layer, head), self.num_heads + head // group
                pairs += [(start + head, writer), (start + kv, writer), (start + kv + self.num_kv_heads, writer)]
            pairs.append((self.mlp_site(layer).first_reader, self.mlp_writer(layer)))
        readers, writers = zip(*pairs, strict=True)
        return np.array(readers), np.array(writers)

    def live(self, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a path of switched-on edges joins to the output.

        Args:
            on: bool ``[num_edges]``.

        Returns:
            Bool ``[num_writers]``: the writers some live reader reads; bool ``[num_readers]``: the inputs of those
            writers (a key or value reader is live when any head of its group is), and the final read.
        """
        writers, readers = np.zeros(self.num_writers, dtype=bool), np.zeros(self.num_readers, dtype=bool)
        for site in reversed(self.sites):
            rows = self._owner_rows(site, writers)
            readers[site.first_reader : site.first_reader + site.num_readers] = rows
            writers[: site.num_writers] |= (site.view(on) & rows[:, None]).any(axis=0)
        return writers, readers

    def everywhere(self, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of what is :meth:`live`, what is needed at every token and not just at the answers.

        That are the keys and values of live heads, and all that leads to them.

        Returns:
            Bool ``[num_writers]``, bool ``[num_readers]``.
        """
        live, _ = self.live(on)
        writers, readers = np.zeros(self.num_writers, dtype=bool), np.zeros(self.num_readers, dtype=bool)
        for site in reversed(self.sites[:-1]):
            rows = self._owner_rows(site, writers)
            if site is self.attention_site(site.layer):
                rows[self.num_heads :] = self._owner_rows(site, live)[self.num_heads :]
            readers[site.first_reader : site.first_reader + site.num_readers] = rows
            writers[: site.num_writers] |= (site.view(on) & rows[:, None]).any(axis=0)
        return writers, readers

    def _owner_rows(self, site: Site, writers: np.ndarray) -> np.ndarray:
        """For each reader of ``site``, whether a writer it feeds is in ``writers``."""
        if site.name == FINAL_READ:
            return np.ones(1, dtype=bool)
        if site is self.mlp_site(site.layer):
            return writers[[self.mlp_writer(site.layer)]]
        heads = writers[self.head_writer(site.layer) : self.mlp_writer(site.layer)]
        groups = heads.reshape(self.num_kv_heads, -1).any(axis=1)
        return np.concatenate([heads, groups, groups])


def _abridged(names: tuple[str, ...], most: int = 8) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 2])}, ..., {names[-1]}"

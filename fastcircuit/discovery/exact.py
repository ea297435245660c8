"""Exact patching: remove every edge, and every writer, alone, and measure how much the loss rises.

All that lies in front of the reader an edge leads to is the clean run. A removed edge changes one component of the
reader's site; from behind that site on it is a plain run on another stream, and so are many edges at once as copies of
the batch.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastcircuit.discovery.plain_run import PlainRun
from fastcircuit.discovery.points import CleanPoint
from fastcircuit.models.states import attend

MOST_TOKENS = 4096
MOST_BYTES = 2**28


@torch.no_grad()
def exact_rises(point: CleanPoint) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the loss, summed over the batch's examples, without each edge ``[num_edges]`` and writer
    ``[num_writers]``.
    """
    patching = Patching(point)
    return patching.edges(), patching.nodes()


class Patching:
    """Changed runs of one batch."""

    def __init__(self, point: CleanPoint) -> None:
        self.point, self.clean, self.graph = point, point.clean, point.clean.graph
        self.before = point.losses(self.clean.streams[self.clean.num_sites][None])
        tokens, width = self.clean.packing.num_tokens, point.embeds.shape[-1]
        fitting = MOST_BYTES // (16 * width * point.embeds.element_size())
        self.copies = max(1, min(MOST_TOKENS, fitting) // tokens)
        self._runs: dict[int, PlainRun] = {}

    def edges(self) -> np.ndarray:
        """Rises without each edge."""
        rises = np.zeros(self.graph.num_edges)
        for number, site in enumerate(self.graph.sites):
            if not site.num_writers:
                continue
            removed = self.point.differences.seen_by(site, self.graph)
            block = site.view(rises)
            component = _Component(self, number)
            for row in range(site.num_readers):
                reads = (self.clean.streams[number] - some for some in removed.split(self.copies))
                block[row] = self._rises(number + 1, (component.behind(row, some) for some in reads))
        return rises

    def nodes(self) -> np.ndarray:
        """Rises without each writer, at all its readers."""
        graph, clean, rises = self.graph, self.clean, np.zeros(self.graph.num_writers)
        differences = self.point.differences
        groups = [(0, slice(0, graph.num_embedding_writers))]
        for layer in range(graph.num_layers):
            first, mlp = graph.head_writer(layer), graph.mlp_writer(layer)
            groups += [(2 * layer + 1, slice(first, mlp)), (2 * layer + 2, slice(mlp, mlp + 1))]
        for behind, rows in groups:
            removed = (differences.top if behind > clean.num_sites - 2 else differences.below)[rows]
            if len(removed):
                streams = (clean.streams[behind] - some for some in removed.split(self.copies))
                rises[rows] = self._rises(behind, streams)
        return rises

    def run(self, copies: int) -> PlainRun:
        if copies not in self._runs:
            self._runs[copies] = self.clean.repeated(copies)
        return self._runs[copies]

    def _rises(self, site: int, streams: Iterator[Tensor]) -> np.ndarray:
        """Rises of runs that go on from ``[K, T, d]`` in front of ``site``."""
        found = []
        for some in streams:
            read = some
            if site < self.clean.num_sites:
                read = self.run(len(some)).forward(some.flatten(0, 1), site, record=False).unflatten(0, (len(some), -1))
            found.append(self.point.losses(read) - self.before)
        return torch.cat(found).numpy()


class _Component:
    """What lies behind a site when one of its readers sees something else."""

    def __init__(self, patching: Patching, number: int) -> None:
        self.patching, self.number, self.clean = patching, number, patching.clean
        self.projected: tuple[Tensor, ...] = ()
        if number < self.clean.num_sites and not number % 2:
            self.attention = self.clean.anatomy.blocks[number // 2].attention
            normed = self.attention.norm(self.clean.streams[number])[None]
            self.projected = tuple(projection(normed) for projection in self.attention.projections)

    def behind(self, row: int, reads: Tensor) -> Tensor:
        """Streams behind the site, ``[K, T, d]``, when its reader ``row`` sees ``reads``, ``[K, T, d]``."""
        clean, number = self.clean, self.number
        if number == clean.num_sites:
            return reads
        if number % 2:
            block = clean.anatomy.blocks[number // 2]
            return clean.streams[number] + block.mlp(block.mlp_norm(reads))
        heads, out = self._heads(row, reads)
        width = out.shape[-1] // len(heads)
        clean_out = clean.outputs[number].unflatten(1, (-1, width))[:, heads]
        change = out.unflatten(2, (len(heads), width)) - clean_out
        weight = self.attention.out_weight[heads]
        return clean.streams[number + 1] + change.flatten(2) @ weight.flatten(0, 1)

    def _heads(self, row: int, reads: Tensor) -> tuple[Tensor, Tensor]:
        """The heads reader ``row`` feeds, and what they put out, ``[K, T or N, n * d_head]``."""
        graph, copies = self.clean.graph, len(reads)
        part, index = which_projection(row, graph.num_heads, graph.num_kv_heads)
        group = graph.num_heads // graph.num_kv_heads
        heads = torch.arange(index, index + 1) if part == 0 else torch.arange(index * group, (index + 1) * group)
        heads = heads.to(reads.device)
        kv = heads[:1] // group
        taken = [self.projected[0][heads], self.projected[1][kv], self.projected[2][kv]]
        taken = [values.repeat(1, copies, 1) for values in taken]
        own = self.attention.projections[part].one(index)
        taken[part] = own(self.attention.norm(reads.flatten(0, 1))[None])
        run = self.patching.run(copies)
        every = torch.zeros_like(heads)
        out = attend(self.attention, tuple(taken), run.rotary, run.packing, run.anatomy.causal, every)
        return heads, run.narrowed(self.number, out).unflatten(0, (copies, -1))


def which_projection(row: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Query (0), key (1) or value (2), and which head or key/value head, a reader of an attention site belongs to."""
    if row < heads:
        return 0, row
    return 1 + (row - heads) // kv_heads, (row - heads) % kv_heads

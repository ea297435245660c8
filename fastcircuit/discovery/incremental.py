"""A batch under a circuit that is decided from the output down: what a removed edge changes, and nothing else.

In front of the reader that is being decided everything is the clean run. Behind it, components that no kept path joins
to the output are never run; of the others, those run again that read, through kept edges, something that changed. Many
removals run at once as copies of the batch.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastcircuit.discovery.exact import which_projection
from fastcircuit.discovery.plain_run import PlainRun
from fastcircuit.discovery.points import CleanPoint
from fastcircuit.models.states import attend


@dataclass
class Trial:
    """K variants of the circuit, each with its loss.

    Args:
        losses: summed over the batch's examples, float64 ``[K]``.
        updates: tensors of the current circuit, and what each variant puts there, ``[K, ...]``.
    """

    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    updates: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def commit(self, variant: int) -> None:
        """Make one variant the current circuit."""
        for current, variants in self.updates:
            current.copy_(variants[variant])


@dataclass
class _Changes:
    """Writers whose rows differ from the current circuit's, and by how much: ``[n, K, T, d]``."""

    writers: list[np.ndarray] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, writers: np.ndarray, rows: Tensor) -> None:
        self.writers.append(writers)
        self.rows.append(rows)

    def narrow(self, answers: Tensor) -> None:
        """From here on only the answers matter."""
        self.rows = [rows.index_select(2, answers) for rows in self.rows]


class IncrementalRun:
    """The current circuit on one batch: the inputs of readers and the outputs of components, as far as decided.

    Args:
        point: the clean run; its differences and outputs become the current circuit's.
        keep: bool ``[num_edges]``, the edges of the current circuit; whoever decides changes it.
    """

    def __init__(self, point: CleanPoint, keep: np.ndarray) -> None:
        self.point, self.clean, self.keep = point, point.clean, keep
        self.graph, self.differences = point.clean.graph, point.differences
        self._readers = self.graph.live(keep)[1]
        self._writers = self.graph.live(keep)[0]
        self._reads: dict[tuple[int, int], Tensor] = {}
        self._projected: dict[int, tuple[Tensor, ...]] = {}
        self._runs: dict[int, PlainRun] = {}

    @torch.no_grad()
    def enter(self, number: int) -> None:
        """Everything behind site ``number`` is decided, and the site itself is next."""
        self._writers, self._readers = self.graph.live(self.keep)
        if number < self.clean.num_sites and number % 2 == 0:
            attention = self.clean.anatomy.blocks[number // 2].attention
            normed = attention.norm(self.clean.streams[number])[None]
            self._projected[number] = tuple(projection(normed) for projection in attention.projections)

    def differs(self, number: int) -> np.ndarray:
        """Bool ``[w]``: the writers of a site whose clean and ablated outputs are not the same."""
        rows = self.differences.seen_by(self.graph.sites[number], self.graph)
        return rows.flatten(1).any(1).cpu().numpy()

    @torch.no_grad()
    def without(self, number: int, row: int, writers: list[int]) -> Trial:
        """Variants in which reader ``row`` of site ``number`` loses the first, the first two, ... of ``writers``."""
        removed = self.differences.seen_by(self.graph.sites[number], self.graph)[writers]
        reads = {row: self._read(number, row) - removed.cumsum(0)}
        trial, changes = Trial(), _Changes()
        for site in range(number, self.clean.num_sites + 1):
            if site > number:
                reads = self._changed_reads(site, changes)
            if site == self.clean.num_sites - 2:
                changes.narrow(self.clean.answers)
            for reader, read in reads.items():
                self._update_read(site, reader, read, trial)
            if reads and site < self.clean.num_sites:
                changes.add(*(self._mlp if site % 2 else self._heads)(site, reads, trial))
        final = reads.get(0)
        if final is None:
            final = self._read(self.clean.num_sites, 0).expand(len(writers), -1, -1)
        trial.losses = self.point.losses(final)
        return trial

    def _read(self, site: int, row: int) -> Tensor:
        """What a reader sees in the current circuit: ``[T, d]``."""
        return self._reads.get((site, row), self.clean.streams[site])

    def _update_read(self, site: int, row: int, variants: Tensor, trial: Trial) -> None:
        if (site, row) not in self._reads:
            self._reads[site, row] = self.clean.streams[site].clone()
        trial.updates.append((self._reads[site, row], variants))

    def _changed_reads(self, number: int, changes: _Changes) -> dict[int, Tensor]:
        """What the live readers of a site see that read something changed, ``[K, T, d]`` by row."""
        site = self.graph.sites[number]
        live = self._readers[site.first_reader : site.first_reader + site.num_readers]
        kept = site.view(self.keep) & live[:, None]
        rows = np.flatnonzero(np.any([kept[:, writers].any(1) for writers in changes.writers], axis=0))
        if not len(rows):
            return {}
        reads = torch.stack([self._read(number, row) for row in rows.tolist()])[:, None]
        for writers, changed in zip(changes.writers, changes.rows, strict=True):
            mask = torch.from_numpy(kept[np.ix_(rows, writers)]).to(changed)
            reads = reads + (mask @ changed.flatten(1)).unflatten(1, changed.shape[1:])
        return dict(zip(rows.tolist(), reads, strict=True))

    def _mlp(self, site: int, reads: dict[int, Tensor], trial: Trial) -> tuple[np.ndarray, Tensor]:
        """Run an MLP on changed reads; returns it as a changed writer."""
        block, writer = self.clean.anatomy.blocks[site // 2], self.graph.mlp_writer(site // 2)
        out = block.mlp(block.mlp_norm(reads[0]))
        trial.updates.append((self.clean.outputs[site], out))
        change = (out - self.clean.outputs[site])[None]
        return self._update_rows(np.array([writer]), change, trial)

    def _heads(self, site: int, reads: dict[int, Tensor], trial: Trial) -> tuple[np.ndarray, Tensor]:
        """Run the live heads that changed reads feed; returns them as changed writers."""
        graph, layer = self.graph, site // 2
        attention = self.clean.anatomy.blocks[layer].attention
        copies = len(next(iter(reads.values())))
        heads = self._fed_heads(layer, reads)
        index = torch.from_numpy(heads).to(self.clean.answers.device)
        run, width = self._run(copies), attention.out_weight.shape[1]
        projected = self._project(site, reads, heads, trial)
        every = torch.arange(len(heads), device=index.device)
        out = attend(attention, projected, run.rotary, run.packing, run.anatomy.causal, every)
        out = run.narrowed(site, out).unflatten(0, (copies, -1)).unflatten(2, (len(heads), width))  # [K, T, n, d_head]
        current = self.clean.outputs[site].unflatten(1, (graph.num_heads, width))
        change = (out - current[:, index]).permute(2, 0, 1, 3)  # [n, K, T, d_head]
        for place, head in enumerate(heads.tolist()):
            trial.updates.append((current[:, head], out[:, :, place]))
        rows = torch.bmm(change.flatten(1, 2), attention.out_weight[index]).unflatten(1, change.shape[1:3])
        return self._update_rows(heads + graph.head_writer(layer), rows, trial)

    def _fed_heads(self, layer: int, reads: dict[int, Tensor]) -> np.ndarray:
        """Live heads of a layer that some changed reader feeds."""
        graph = self.graph
        first = graph.attention_site(layer).first_reader
        readers, writers = graph.feeds
        fed = writers[np.isin(readers, first + np.array(list(reads)))]
        return np.unique(fed[self._writers[fed]]) - graph.head_writer(layer)

    def _project(self, site: int, reads: dict[int, Tensor], heads: np.ndarray, trial: Trial) -> tuple[Tensor, ...]:
        """Queries, keys and values of ``heads``, one of each for every head: ``[n, K * T, d_head]``."""
        graph = self.graph
        attention = self.clean.anatomy.blocks[site // 2].attention
        copies = len(next(iter(reads.values())))
        groups = heads // (graph.num_heads // graph.num_kv_heads)
        places = (heads, groups, groups)
        found = [
            values[torch.from_numpy(place)].repeat(1, copies, 1)
            for values, place in zip(self._projected[site], places, strict=True)
        ]
        for row, read in reads.items():
            part, index = which_projection(row, graph.num_heads, graph.num_kv_heads)
            projection = attention.projections[part].take(torch.tensor([index], device=read.device))
            values = projection(attention.norm(read.flatten(0, 1))[None])[0]
            trial.updates.append((self._projected[site][part][index], values.unflatten(0, (copies, -1))))
            found[part][torch.from_numpy(np.flatnonzero(places[part] == index))] = values
        return tuple(found)

    def _update_rows(self, writers: np.ndarray, change: Tensor, trial: Trial) -> tuple[np.ndarray, Tensor]:
        below, top = self.differences.below, self.differences.top
        for writer, each in zip(writers.tolist(), change, strict=True):
            if writer < len(below):
                trial.updates.append((below[writer], below[writer] + each))
                each = each.index_select(1, self.clean.answers)
            trial.updates.append((top[writer], top[writer] + each))
        return writers, change

    def _run(self, copies: int) -> PlainRun:
        if copies not in self._runs:
            self._runs[copies] = self.clean.repeated(copies)
        return self._runs[copies]

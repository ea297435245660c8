"""A batch under a circuit that is decided from the output down: what a removed edge changes, and nothing else.

In front of the reader that is being decided everything is the clean run. Behind it, components that no kept path joins
to the output are never run; of the others, those run again that read, through kept edges, something that changed, and
at the answers alone if no key or value depends on what they write. Many removals run at once as copies of the batch.

Of a prompt and its corrupted one, the tokens in front of the first that differs are the same run: nothing there ever
changes, and only attention still sees them, as clean keys and values.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fastcircuit.discovery.exact import which_projection
from fastcircuit.discovery.plain_run import Differences, PlainRun
from fastcircuit.discovery.points import CleanPoint
from fastcircuit.models.states import attend
from fastcircuit.ops import masked_read


@dataclass
class Trial:
    """K variants of the circuit, each with its loss. To be used before its run's next trial, which takes its memory.

    Args:
        losses: summed over the batch's examples, float64 ``[K]``.
        updates: tensors of the current circuit; the rows (None: all) at which variants differ, and what they put
            there, ``[K, ...]``.
        changes: tensors of the current circuit, and what variants add to them, ``[K, ...]``.
    """

    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    updates: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    changes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def commit(self, variant: int) -> None:
        """Make one variant the current circuit."""
        for current, tokens, variants in self.updates:
            if tokens is None:
                current.copy_(variants[variant])
            else:
                current.index_copy_(0, tokens, variants[variant])
        for current, variants in self.changes:
            current += variants[variant]


@dataclass
class _Rows:
    """Writers whose rows differ from the current circuit's, and by how much: the first rows of ``buffer``.

    Args:
        buffer: ``[W, K, S, d]``, or ``[W, K, N, d]``.
    """

    buffer: Tensor
    writers: list[int] = field(default_factory=list)

    def add(self, writers: np.ndarray) -> Tensor:
        """Rows for some more writers, to be filled in."""
        first = len(self.writers)
        self.writers += writers.tolist()
        return self.buffer[first : len(self.writers)]

    def read(self, mask: np.ndarray) -> Tensor:
        """The sums of rows that ``mask`` ``[R, n]`` asks for, ``[R, K, S or N, d]``."""
        rows = self.buffer[: len(self.writers)]
        weights = torch.from_numpy(mask).to(rows.device, rows.dtype if rows.dtype.itemsize > 2 else torch.float32)
        return masked_read(rows.flatten(1, 2), weights).unflatten(1, rows.shape[1:3])


class _Changes:
    """Rows of writers that are needed everywhere, and of all at the answers, which are ``places`` of those."""

    def __init__(self, everywhere: Tensor, at_answers: Tensor, places: Tensor) -> None:
        self.everywhere, self.at_answers, self.places = _Rows(everywhere), _Rows(at_answers), places

    def narrow(self, writers: np.ndarray, rows: Tensor) -> Tensor:
        """Add rows that were filled in to those at the answers."""
        return torch.index_select(rows, 2, self.places, out=self.at_answers.add(writers))


@torch.no_grad()
def changing_tokens(point: CleanPoint) -> Tensor:
    """The packed tokens at which anything can differ from the clean run, and the answers, in order, ``[S]``.

    Under interchange ablation of a causal model: those from the first on whose embeddings are not the corrupted ones.
    """
    packing, answers = point.batch.packing, point.clean.answers
    if not (point.reference.interchange and point.clean.anatomy.causal):
        return torch.arange(packing.num_tokens, device=answers.device)
    differs = (point.embeds != point.batch.ablated.embeds).any(2).any(0)
    changing = torch.cat([row.cummax(0).values for row in differs.long().split(packing.lengths.tolist())]).bool()
    changing[answers] = True
    return changing.nonzero().squeeze(1)


class IncrementalRun:
    """The current circuit on one batch: the inputs of readers and the outputs of components, as far as decided.

    What is needed everywhere has the S of T tokens that can change, what is needed at the answers alone has N.

    Args:
        point: the clean run; its differences become the current circuit's.
        keep: bool ``[num_edges]``, the edges of the current circuit; whoever decides changes it.
    """

    def __init__(self, point: CleanPoint, keep: np.ndarray) -> None:
        self.clean, self.keep, self.graph = point.clean, keep, point.clean.graph
        self.tokens = changing_tokens(point)
        self._places = torch.searchsorted(self.tokens, self.clean.answers)
        if self.num_tokens < self.clean.packing.num_tokens:
            below, top = point.differences.below, point.differences.top
            point = replace(point, differences=Differences(below.index_select(1, self.tokens), top))
        self.point, self.differences = point, point.differences
        self._reads: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._projected: dict[int, tuple[Tensor, ...]] = {}
        self._runs: dict[int, PlainRun] = {}
        self._memory = [self.differences.below.new_empty(0) for _ in range(2)]

    @property
    def num_tokens(self) -> int:
        """S: the tokens that can change."""
        return len(self.tokens)

    @torch.no_grad()
    def enter(self, number: int) -> None:
        """Everything behind site ``number`` is decided, and the site itself is next."""
        graph, clean, layer = self.graph, self.clean, number // 2
        self._live_writers, self._live_readers = graph.live(self.keep)
        self._writers_everywhere, self._readers_everywhere = graph.everywhere(self.keep)
        if number == clean.num_sites:
            return
        out = clean.outputs[number]
        if number % 2:
            self._store_output(graph.mlp_writer(layer), out)
            return
        for head, values in enumerate(out.unflatten(1, (graph.num_heads, -1)).unbind(1)):
            self._store_output(graph.head_writer(layer, head), values)
        attention = clean.anatomy.blocks[layer].attention
        normed = attention.norm(clean.streams[number])[None]
        self._projected[number] = tuple(projection(normed) for projection in attention.projections)

    def differs(self, number: int, row: int) -> np.ndarray:
        """Bool ``[w]``: the writers of a site of which a reader would see a difference between clean and ablated."""
        return self._removable(number, row).flatten(1).any(1).cpu().numpy()

    @torch.no_grad()
    def without(self, number: int, row: int, writers: list[int]) -> Trial:
        """Variants in which reader ``row`` of site ``number`` loses the first, the first two, ... of ``writers``."""
        return self._behind(number, row, self._removable(number, row)[writers].cumsum(0))

    @torch.no_grad()
    def without_each(self, number: int, row: int, writers: list[int]) -> Trial:
        """Variants in which reader ``row`` of site ``number`` loses one of ``writers``."""
        return self._behind(number, row, self._removable(number, row)[writers])

    @torch.no_grad()
    def without_all(self, number: int, row: int, writers: list[int]) -> Trial:
        """The one variant in which reader ``row`` of site ``number`` loses all of ``writers``."""
        return self._behind(number, row, self._removable(number, row)[writers].sum(0, keepdim=True))

    def is_live(self, number: int, row: int) -> bool:
        """Whether a kept path joins what reader ``row`` of site ``number`` feeds to the output."""
        return bool(self._live_readers[self.graph.sites[number].first_reader + row])

    def _behind(self, number: int, row: int, removed: Tensor) -> Trial:
        """Variants in which reader ``row`` of site ``number`` sees less, by ``[K, S, d]`` or ``[K, N, d]``."""
        reads = {row: self._read(number, row) - removed}
        trial, changes = Trial(), self._no_changes(len(removed))
        for site in range(number, self.clean.num_sites + 1):
            if site > number:
                reads = self._changed_reads(site, changes)
            for reader, read in reads.items():
                self._update_read(site, reader, read, trial)
            if reads and site < self.clean.num_sites:
                (self._run_mlp if site % 2 else self._run_heads)(site, reads, trial, changes)
        final = reads.get(0)
        if final is None:
            final = self._read(self.clean.num_sites, 0).expand(len(removed), -1, -1)
        trial.losses = self.point.losses(final)
        return trial

    def _everywhere(self, number: int, row: int) -> bool:
        """Whether a reader is needed at every token that can change."""
        return bool(self._readers_everywhere[self.graph.sites[number].first_reader + row])

    def _removable(self, number: int, row: int) -> Tensor:
        """The differences a reader sees: ``[w, S, d]`` or ``[w, N, d]``."""
        rows = self.differences.below if self._everywhere(number, row) else self.differences.top
        return rows[: self.graph.sites[number].num_writers]

    def _read(self, number: int, row: int) -> Tensor:
        """What a reader sees in the current circuit: ``[S, d]`` or ``[N, d]``."""
        if (number, row) in self._reads:
            return self._reads[number, row]
        return self._clean_read(number, self._everywhere(number, row))

    def _clean_read(self, number: int, everywhere: bool) -> Tensor:
        stream = self.clean.streams[number]
        return stream if number > self.clean.num_sites - 2 else self._narrowed(stream, everywhere)

    def _narrowed(self, values: Tensor, everywhere: bool, axis: int = 0) -> Tensor:
        """Of all tokens, along an axis, those that can change, or the answers."""
        if everywhere and self.num_tokens == values.shape[axis]:
            return values
        return values.index_select(axis, self.tokens if everywhere else self.clean.answers)

    def _update_read(self, number: int, row: int, variants: Tensor, trial: Trial) -> None:
        if (number, row) not in self._reads:
            self._reads[number, row] = self._read(number, row).clone()
        trial.updates.append((self._reads[number, row], None, variants))

    def _store_output(self, writer: int, out: Tensor) -> None:
        """Keep what a live component made of the clean run."""
        if self._live_writers[writer]:
            if writer < self.graph.head_writer(self.graph.num_layers - 1):
                out = self._narrowed(out, bool(self._writers_everywhere[writer]))
            self._outputs[writer] = out.clone()

    def _changed_reads(self, number: int, changes: _Changes) -> dict[int, Tensor]:
        """What the live readers of a site see that read something changed, ``[K, S, d]`` or ``[K, N, d]`` by row."""
        site = self.graph.sites[number]
        rows = slice(site.first_reader, site.first_reader + site.num_readers)
        kept, everywhere = site.view(self.keep), self._readers_everywhere[rows]
        at_answers = self._live_readers[rows] & ~everywhere
        wide = self._sum_changes(number, np.flatnonzero(everywhere), kept, changes.everywhere)
        return wide | self._sum_changes(number, np.flatnonzero(at_answers), kept, changes.at_answers)

    def _sum_changes(self, number: int, rows: np.ndarray, kept: np.ndarray, changes: _Rows) -> dict[int, Tensor]:
        """The inputs of those of ``rows`` that read any of ``changes``."""
        if not len(rows) or not changes.writers:
            return {}
        mask = kept[rows][:, changes.writers]
        reading = mask.any(1)
        if not reading.any():
            return {}
        reads = changes.read(mask[reading])
        found = dict(zip(rows[reading].tolist(), reads, strict=True))
        for row, read in found.items():
            read += self._read(number, row)
        return found

    def _run_mlp(self, site: int, reads: dict[int, Tensor], trial: Trial, changes: _Changes) -> None:
        """Run an MLP on changed reads."""
        block, writer = self.clean.anatomy.blocks[site // 2], self.graph.mlp_writer(site // 2)
        out = block.mlp(block.mlp_norm(reads[0]))
        current = self._outputs[writer]
        trial.updates.append((current, None, out))
        rows = self._rows(np.array([writer]), changes)
        torch.sub(out, current, out=rows[0])
        self._note(np.array([writer]), rows, trial, changes)

    def _run_heads(self, site: int, reads: dict[int, Tensor], trial: Trial, changes: _Changes) -> None:
        """Run the live heads that changed reads feed."""
        layer, copies = site // 2, len(next(iter(reads.values())))
        attention = self.clean.anatomy.blocks[layer].attention
        heads = self._fed_heads(layer, reads)
        run, width = self._run(copies), attention.out_weight.shape[1]
        projected = self._project(site, reads, heads, trial)
        every = torch.arange(len(heads), device=run.answers.device)
        out = attend(attention, projected, run.rotary, run.packing, run.anatomy.causal, every).unflatten(
            0, (copies, -1)
        )
        wide = self._writers_everywhere[heads + self.graph.head_writer(layer)]
        for everywhere in (True, False):
            places = np.flatnonzero(wide == everywhere)
            if not len(places):
                continue
            some = self._narrowed(out, everywhere, axis=1).unflatten(2, (len(heads), width))[:, :, places]
            self._change_heads(layer, heads[places], some.permute(2, 0, 1, 3), trial, changes)

    def _change_heads(self, layer: int, heads: np.ndarray, out: Tensor, trial: Trial, changes: _Changes) -> None:
        """Note what heads put out, ``[n, K, S or N, d_head]``."""
        writers = heads + self.graph.head_writer(layer)
        current = [self._outputs[writer] for writer in writers.tolist()]
        trial.updates += [(tensor, None, variants) for tensor, variants in zip(current, out, strict=True)]
        weight = self.clean.anatomy.blocks[layer].attention.out_weight[torch.from_numpy(heads)]
        change = (out - torch.stack(current)[:, None]).flatten(1, 2)
        rows = self._rows(writers, changes)
        torch.bmm(change, weight, out=rows.flatten(1, 2))
        self._note(writers, rows, trial, changes)

    def _rows(self, writers: np.ndarray, changes: _Changes) -> Tensor:
        """Where to put by how much writers change; all alike in where they are needed."""
        return (changes.everywhere if self._writers_everywhere[writers[0]] else changes.at_answers).add(writers)

    def _note(self, writers: np.ndarray, rows: Tensor, trial: Trial, changes: _Changes) -> None:
        """Pass on changed rows, ``[n, K, S, d]`` or ``[n, K, N, d]``, that are filled in."""
        below, top, numbers = self.differences.below, self.differences.top, writers.tolist()
        if self._writers_everywhere[writers[0]]:
            trial.changes += zip((below[writer] for writer in numbers), rows, strict=True)
            rows = changes.narrow(writers, rows)
        trial.changes += zip((top[writer] for writer in numbers), rows, strict=True)

    def _no_changes(self, copies: int) -> _Changes:
        """An empty list of changes of so many variants, in memory that every trial uses again."""
        tensors = self.differences.below, self.differences.top
        buffers = []
        for number, tensor in enumerate(tensors):
            wanted = copies * tensor.numel()
            if len(self._memory[number]) < wanted:
                self._memory[number] = tensor.new_empty(wanted)
            buffers.append(self._memory[number][:wanted].view(len(tensor), copies, *tensor.shape[1:]))
        return _Changes(buffers[0], buffers[1], self._places)

    def _fed_heads(self, layer: int, reads: dict[int, Tensor]) -> np.ndarray:
        """Live heads of a layer that some changed reader feeds."""
        graph = self.graph
        first = graph.attention_site(layer).first_reader
        readers, writers = graph.feeds
        fed = writers[np.isin(readers, first + np.array(list(reads)))]
        return np.unique(fed[self._live_writers[fed]]) - graph.head_writer(layer)

    def _project(self, site: int, reads: dict[int, Tensor], heads: np.ndarray, trial: Trial) -> tuple[Tensor, ...]:
        """Queries, keys and values of ``heads``, one of each for every head: ``[n, K * T, d_head]``."""
        graph, answers = self.graph, self.clean.answers
        attention = self.clean.anatomy.blocks[site // 2].attention
        copies = len(next(iter(reads.values())))
        groups = heads // (graph.num_heads // graph.num_kv_heads)
        places = (heads, groups, groups)
        found = [
            values[torch.from_numpy(place)].repeat(1, copies, 1).unflatten(1, (copies, -1))
            for values, place in zip(self._projected[site], places, strict=True)
        ]
        for row, read in reads.items():
            part, index = which_projection(row, graph.num_heads, graph.num_kv_heads)
            projection = attention.projections[part].one(index)
            values = projection(attention.norm(read.flatten(0, 1))[None])[0].unflatten(0, (copies, -1))
            tokens = self.tokens if self._everywhere(site, row) else answers
            trial.updates.append((self._projected[site][part][index], tokens, values))
            for place in np.flatnonzero(places[part] == index).tolist():
                found[part][place].index_copy_(1, tokens, values)
        return found[0].flatten(1, 2), found[1].flatten(1, 2), found[2].flatten(1, 2)

    def _run(self, copies: int) -> PlainRun:
        if copies not in self._runs:
            self._runs[copies] = self.clean.repeated(copies)
        return self._runs[copies]

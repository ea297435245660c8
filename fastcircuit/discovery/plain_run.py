"""The unmasked model from any site on, and the gradient at the input of every reader, one site at a time.

With all masks 1 the readers of a site see the same stream, so that nothing has to be read through a mask. What tells
them apart is only the gradient at their inputs, ``g_r``: the gradient of the mask of edge (j -> r) is ``<D_j, g_r>``,
one matrix product of a site's gradients with the differences D.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcircuit.graph import Graph, Site
from fastcircuit.models.anatomy import Anatomy
from fastcircuit.models.components import AttentionRun, MlpRun
from fastcircuit.models.inputs import KeptReads
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States, attend, output_projection
from fastcircuit.models.stream import KEEP_BYTES
from fastcircuit.ops import masked_read_backward_


@dataclass
class PlainRun:
    """The model with every mask 1, over T packed tokens of which N are answers.

    Sites are counted ``0, 1, ..., 2 L``: attention and MLP of every layer, then the final read. What the last attention
    writes is wanted at the answers alone, so that streams in front of later sites are ``[N, d]``, earlier ones
    ``[T, d]``.

    Args:
        answers: packed tokens at which the final read is wanted, ``[N]``.
        keep_graphs: keep every block's graph for the backward pass; otherwise blocks are run again as it comes to them.

    Attributes:
        streams: what is in front of every site of the last recorded :meth:`forward`, the final read included.
        outputs: what its sites made of that: heads ``[T, H * d_head]`` before the output projection, MLPs ``[T, d]``.
    """

    anatomy: Anatomy
    graph: Graph
    packing: Packing
    answers: Tensor
    keep_graphs: bool = False
    streams: dict[int, Tensor] = field(init=False, default_factory=dict)
    outputs: dict[int, Tensor] = field(init=False, default_factory=dict)
    _runs: dict[int, AttentionRun | MlpRun] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions = self.packing.position_ids
        self.rotary = None if self.anatomy.rotary is None else self.anatomy.rotary(positions)

    @classmethod
    def of(cls, model: MaskedCausalLM, packing: Packing, answers: Tensor) -> "PlainRun":
        """A run of ``model``; its graphs are kept unless that is estimated to take more than KEEP_BYTES."""
        numbers = 16 * model.graph.num_layers * packing.num_tokens * model.config.hidden_size
        keep_graphs = numbers * model.dtype.itemsize <= KEEP_BYTES
        return cls(model.anatomy, model.graph, packing, answers, keep_graphs)

    @property
    def num_sites(self) -> int:
        """Sites that write: all but the final read."""
        return 2 * self.graph.num_layers

    def repeated(self, copies: int) -> "PlainRun":
        """An empty run over so many copies of the tokens, that keeps nothing."""
        starts = torch.arange(copies, device=self.answers.device)[:, None] * self.packing.num_tokens
        return PlainRun(
            self.anatomy, self.graph, self.packing.repeated(copies), (starts + self.answers).flatten(), False
        )

    @torch.no_grad()
    def forward(self, stream: Tensor, first: int = 0, record: bool = True) -> Tensor:
        """The final read ``[N, d]``, from the stream in front of site ``first``.

        Args:
            record: keep streams, outputs and (with ``keep_graphs``) graphs of these sites.
        """
        if record:
            self._runs.clear()
        for site in range(first, self.num_sites):
            run = self._component(site, stream)
            out = run.forward(keep_graph=record and self.keep_graphs)
            if record:
                self.streams[site] = stream
                if self.keep_graphs:
                    self._runs[site] = run
            out, stream = self.narrowed(site, out), self.narrowed(site, stream)
            if record:
                self.outputs[site] = out
            stream = stream + self.written(site, out)
        if record:
            self.streams[self.num_sites] = stream
        return stream

    def written(self, site: int, out: Tensor, with_bias: bool = True) -> Tensor:
        """What ``site`` adds to the stream, ``[T, d]``, from its output."""
        if site % 2:
            return out
        attention = self.anatomy.blocks[site // 2].attention
        result = out @ output_projection(attention)
        return result + attention.out_bias if with_bias and attention.out_bias is not None else result

    def narrowed(self, site: int, values: Tensor) -> Tensor:
        """``[T, ...]`` as it is wanted behind ``site``: at the answers, if that is the last attention."""
        return values.index_select(0, self.answers) if site == self.num_sites - 2 else values

    def widened(self, site: int, grad: Tensor) -> Tensor:
        """The gradient in front of ``site`` from that behind it, what the site itself passes on left out."""
        if site != self.num_sites - 2:
            return grad
        return grad.new_zeros(self.packing.num_tokens, grad.shape[1]).index_copy_(0, self.answers, grad)

    @torch.no_grad()
    def backward(self, grad: Tensor, differences: "Differences", scores: Tensor, first: int = 0) -> Tensor:
        """Add ``<g_r, D_j>`` of every edge into site ``first`` and later ones to ``scores``.

        Args:
            grad: of the final read, ``[N, d]``.
            scores: ``[num_edges]``, in the dtype of masks.

        Returns:
            The gradient of the stream in front of site ``first``.
        """
        self._add(self.num_sites, grad[None].contiguous(), differences, scores)
        for site in reversed(range(first, self.num_sites)):
            grad = self.pass_back(site, grad, differences, scores)
        return grad

    @torch.no_grad()
    def pass_back(self, site: int, grad: Tensor, differences: "Differences", scores: Tensor) -> Tensor:
        """The step of :meth:`backward` over one site: from the gradient behind it to that in front of it."""
        run = self._runs.pop(site, None)
        if run is None:
            run = self._component(site, self.streams[site])
            run.forward(keep_graph=True)
        if isinstance(run, MlpRun):
            reads = run.backward(grad)
        else:
            projection = output_projection(run.attention)
            (reads,) = run.backward(self.widened(site, grad @ projection.T))
        self._add(site, reads, differences, scores)
        return self.widened(site, grad) + reads.sum(0)

    def _component(self, site: int, stream: Tensor) -> AttentionRun | MlpRun:
        block = self.anatomy.blocks[site // 2]
        if site % 2:
            return MlpRun(block, KeptReads(block.mlp_norm, stream[None]))

        def run(projected: tuple[Tensor, ...]) -> Tensor:
            return attend(block.attention, projected, self.rotary, self.packing, self.anatomy.causal)

        return AttentionRun(block.attention, run, [KeptReads(block.attention.norm, stream[None])])

    def _add(self, site: int, reads: Tensor, differences: "Differences", scores: Tensor) -> None:
        place = self.graph.sites[site]
        if not place.num_writers:
            return
        rows = differences.seen_by(place, self.graph)
        mask = torch.zeros(place.num_readers, place.num_writers, dtype=scores.dtype, device=rows.device)
        products = masked_read_backward_(reads, rows, mask, None)
        assert products is not None
        place.view(scores).add_(products)


@dataclass(frozen=True)
class Differences:
    """``D_j = y_j - y~_j`` of every writer, clean minus ablated.

    Args:
        below: the writers below the last layer, ``[w, T, d]``.
        top: every writer, at the answers, ``[W, N, d]``.
    """

    below: Tensor
    top: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, run: PlainRun, embeds: Tensor, ablated: States) -> "Differences":
        """From the recorded clean run, whose embedding tables gave ``embeds`` ``[E, T, d]``."""
        graph, last = run.graph, run.graph.num_layers - 1
        tokens, width = embeds.shape[1:]
        below = embeds.new_empty(graph.head_writer(last), tokens, width)
        top = embeds.new_empty(graph.num_writers, len(run.answers), width)
        if graph.num_embedding_writers:
            difference = embeds - ablated.embeds
            joint = graph.embedding_nodes == "joint"
            below[: graph.num_embedding_writers] = difference.sum(0, keepdim=True) if joint else difference
        at_answers = ablated.take(run.answers)
        for layer in range(graph.num_layers):
            states, rows = (at_answers, top) if layer == last else (ablated, below)
            first, mlp = graph.head_writer(layer), graph.mlp_writer(layer)
            _write_heads(run, layer, states, rows[first:mlp])
            torch.sub(run.outputs[2 * layer + 1], states.mlps[layer], out=rows[mlp])
        torch.index_select(below, 1, run.answers, out=top[: len(below)])
        return cls(below, top)

    def seen_by(self, site: Site, graph: Graph) -> Tensor:
        """What the readers of ``site`` read: ``[w, T, d]``, or ``[w, N, d]`` behind the last attention."""
        behind = site is graph.final_site or site is graph.mlp_site(graph.num_layers - 1)
        return (self.top if behind else self.below)[: site.num_writers]


def _write_heads(run: PlainRun, layer: int, ablated: States, rows: Tensor) -> None:
    """The differences of a layer's heads, ``[H, T, d]``."""
    attention = run.anatomy.blocks[layer].attention
    difference = (run.outputs[2 * layer] - ablated.heads[layer]).unflatten(1, (run.graph.num_heads, -1))
    torch.bmm(difference.transpose(0, 1), attention.out_weight, out=rows)
    if attention.out_bias is not None and not ablated.has_output_bias:
        rows += attention.out_bias / run.graph.num_heads

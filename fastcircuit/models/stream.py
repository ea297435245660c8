"""The disentangled residual stream: one buffer, one masked forward loop, and its backward, as one autograd node.

Writer j's row of the stream is ``D_j = y_j - y~_j``, clean minus ablated; a reader sees

    x_r = base_r + sum_j z_rj D_j          base_r = sum_j y~_j   (DESIGN: the one equation)

Forward fills D block by block without building a graph. Backward walks the blocks in reverse: it recomputes a block
from its reads (or takes up the graph that was kept), differentiates it alone, and adds into one gradient buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcircuit.graph import Graph, Site
from fastcircuit.models.active import Active
from fastcircuit.models.anatomy import Anatomy, Block, project
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States, attend, output_projection
from fastcircuit.ops import masked_read, masked_read_backward_

# Readers' inputs up to this size are kept for backward rather than computed twice.
KEEP_BYTES = 2**30


@dataclass
class MaskedRun:
    """One masked forward pass over T packed tokens, and what its backward needs.

    Args:
        anatomy, graph: the model.
        packing: the batch's tokens.
        embeds: clean outputs of the embedding tables, ``[E, T, d]``.
        ablated: what a removed edge carries.
        answers: packed tokens at which the final read is wanted, ``[N]``, without repeats.
        recompute: recompute each block in backward (one block of activations alive) instead of keeping its graph;
            None: keep graphs while the readers' inputs take at most KEEP_BYTES.
        skip_zeros: leave out writers that reach the output through masks of exactly 0 only. The logits do not change;
            the gradient of a mask that is exactly 0 may be reported as 0, as a clamped hard-concrete sample's is.
        backend: which ``masked_read`` to use.
    """

    anatomy: Anatomy
    graph: Graph
    packing: Packing
    embeds: Tensor
    ablated: States
    answers: Tensor
    recompute: bool | None = None
    skip_zeros: bool = False
    backend: str = "auto"
    active: Active = field(init=False)
    stream: Tensor | None = field(init=False, default=None)
    bases: list[Tensor] = field(init=False, default_factory=list)
    kept: dict[str, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions = self.packing.position_ids
        self.rotary = None if self.anatomy.rotary is None else self.anatomy.rotary(positions)

    def __call__(self, mask: Tensor) -> Tensor:
        """Final read at the answers, ``[N, d]``, for the mask ``z_rj`` of every edge, ``[num_edges]``."""
        return _MaskedRunFunction.apply(mask, self)

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed in backward; decided by the size of all readers' inputs unless it was said."""
        if self.recompute is not None:
            return self.recompute
        reads = self.graph.num_readers * self.embeds[0].numel() * self.embeds.element_size()
        return reads > KEEP_BYTES

    def forward(self, mask: Tensor, keep_graphs: bool) -> Tensor:
        on = (mask != 0).cpu().numpy() if self.skip_zeros else None
        self.active = Active(self.graph, on, mask.device)
        _, tokens, width = self.embeds.shape
        self.stream = self.embeds.new_empty(self.active.num_writers, tokens, width)
        base = self._write_embeddings()
        for layer, block in enumerate(self.anatomy.blocks):
            self.bases.append(base)
            base = self._write_attention(layer, block, mask, base, keep_graphs)
            self.bases.append(base)
            base = self._write_mlp(layer, block, mask, base, keep_graphs)
        weights = self.active.weights(self.graph.final_site, mask)
        answers = self.stream.index_select(1, self.answers)
        return masked_read(answers, weights, base.index_select(0, self.answers), backend=self.backend)[0]

    def backward(self, mask: Tensor, grad_read: Tensor) -> Tensor:
        """Gradient of every edge's mask, ``[num_edges]``, from that of the final read, ``[N, d]``."""
        if self.stream is None:
            raise RuntimeError("the masked forward pass keeps its stream for one backward only; run it again")
        grad_stream = torch.zeros_like(self.stream)
        grad_mask = torch.zeros_like(mask)
        self._backward_final_read(mask, grad_read, grad_stream, grad_mask)
        for layer in reversed(range(self.graph.num_layers)):
            block = self.anatomy.blocks[layer]
            self._backward_mlp(layer, block, mask, grad_stream, grad_mask)
            self._backward_attention(layer, block, mask, grad_stream, grad_mask)
        self.stream = None
        return grad_mask

    def _write_embeddings(self) -> Tensor:
        """Write the embedding rows; returns the first base, ``[T, d]``."""
        clean, ablated = self.embeds, self.ablated.embeds.expand_as(self.embeds)
        if self.graph.embedding_nodes == "none":
            return clean.sum(0)
        if self.graph.embedding_nodes == "joint":
            clean, ablated = clean.sum(0, keepdim=True), ablated.sum(0, keepdim=True)
        for writer in range(clean.shape[0]):
            if self.active.is_live(writer):
                torch.sub(clean[writer], ablated[writer], out=self._stream_row(writer))
        return ablated.sum(0)

    def _write_attention(self, layer: int, block: Block, mask: Tensor, base: Tensor, keep_graph: bool) -> Tensor:
        """Write the live heads' rows; returns the base with the ablated heads added."""
        attention, ablated = block.attention, self.ablated.heads[layer]
        heads = self.active.heads(layer)
        if len(heads):
            out = self._run_site(
                self.graph.attention_site(layer), mask, base, self._attention(layer, block), keep_graph
            )
            reference = ablated if self.active.everything else _take_heads(ablated, heads, self.graph.num_heads)
            rows = self._head_rows(self.stream, layer)
            weight = attention.out_weight if self.active.everything else attention.out_weight.index_select(0, heads)
            torch.bmm((out - reference).unflatten(1, (len(heads), -1)).transpose(0, 1), weight, out=rows)
            if attention.out_bias is not None and not self.ablated.has_output_bias:
                rows += attention.out_bias / self.graph.num_heads
        written = ablated @ output_projection(attention)
        if attention.out_bias is not None and self.ablated.has_output_bias:
            written = written + attention.out_bias
        return base + written

    def _write_mlp(self, layer: int, block: Block, mask: Tensor, base: Tensor, keep_graph: bool) -> Tensor:
        """Write the MLP's row if it is live; returns the base with the ablated MLP added."""
        writer, ablated = self.graph.mlp_writer(layer), self.ablated.mlps[layer]
        if self.active.is_live(writer):
            out = self._run_site(self.graph.mlp_site(layer), mask, base, self._mlp(block), keep_graph)
            torch.sub(out, ablated, out=self._stream_row(writer))
        return base + ablated

    def _backward_attention(
        self, layer: int, block: Block, mask: Tensor, grad_stream: Tensor, grad_mask: Tensor
    ) -> None:
        base, heads = self.bases.pop(), self.active.heads(layer)
        if not len(heads):
            return
        weight = block.attention.out_weight
        if not self.active.everything:
            weight = weight.index_select(0, heads)
        rows = self._head_rows(grad_stream, layer)
        grad_out = torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        site = self.graph.attention_site(layer)
        self._backward_site(site, mask, base, self._attention(layer, block), grad_out, grad_stream, grad_mask)

    def _backward_mlp(self, layer: int, block: Block, mask: Tensor, grad_stream: Tensor, grad_mask: Tensor) -> None:
        base, writer = self.bases.pop(), self.graph.mlp_writer(layer)
        if not self.active.is_live(writer):
            return
        grad_out = grad_stream[self.active.row(writer)]
        site = self.graph.mlp_site(layer)
        self._backward_site(site, mask, base, self._mlp(block), grad_out, grad_stream, grad_mask)

    def _attention(self, layer: int, block: Block) -> Callable[[Tensor], Tensor]:
        """Reads of the live readers, ``[n, T, d]``, to the live heads' outputs, ``[T, live heads * d_head]``."""

        def run(reads: Tensor) -> Tensor:
            attention, head_to_kv = block.attention, None
            if not self.active.everything:
                live = self.active.heads(layer)
                group = self.graph.num_heads // self.graph.num_kv_heads
                groups, head_to_kv = torch.unique(live // group, return_inverse=True)
                attention = attention.take(live, groups)
            projected = project(attention.norm(reads), attention.projections)
            return attend(attention, projected, self.rotary, self.packing, self.anatomy.causal, head_to_kv)

        return run

    @staticmethod
    def _mlp(block: Block) -> Callable[[Tensor], Tensor]:
        return lambda reads: block.mlp(block.mlp_norm(reads[0]))

    def _stream_row(self, writer: int) -> Tensor:
        assert self.stream is not None
        return self.stream[self.active.row(writer)]

    def _head_rows(self, rows: Tensor | None, layer: int) -> Tensor:
        """The live heads' rows of the stream or of its gradient."""
        assert rows is not None
        return rows[self.active.row(self.graph.head_writer(layer)) : self.active.row(self.graph.mlp_writer(layer))]

    def _read(self, site: Site, mask: Tensor, base: Tensor) -> Tensor:
        assert self.stream is not None
        stream = self.stream[: self.active.row(site.num_writers)]
        return masked_read(stream, self.active.weights(site, mask), base, backend=self.backend)

    def _run_site(
        self, site: Site, mask: Tensor, base: Tensor, component: Callable[[Tensor], Tensor], keep_graph: bool
    ) -> Tensor:
        reads = self._read(site, mask, base)
        if not keep_graph:
            return component(reads)
        with torch.enable_grad():
            out = component(reads.requires_grad_())
        self.kept[site.name] = reads, out
        return out.detach()

    def _backward_site(
        self,
        site: Site,
        mask: Tensor,
        base: Tensor,
        component: Callable[[Tensor], Tensor],
        grad_out: Tensor,
        grad_stream: Tensor,
        grad_mask: Tensor,
    ) -> None:
        """Differentiate one component alone, and pass its gradient on to the masks and rows it reads."""
        assert self.stream is not None
        if site.name in self.kept:
            reads, out = self.kept.pop(site.name)
        else:
            reads = self._read(site, mask, base)
            with torch.enable_grad():
                out = component(reads.requires_grad_())
        (grad_reads,) = torch.autograd.grad(out, reads, grad_out)
        del reads, out
        count = self.active.row(site.num_writers)
        weights = self.active.weights(site, mask)
        grad = _mask_gradient(grad_reads, self.stream[:count], weights, grad_stream[:count], backend=self.backend)
        self.active.store(site, grad_mask, grad)

    def _backward_final_read(self, mask: Tensor, grad_read: Tensor, grad_stream: Tensor, grad_mask: Tensor) -> None:
        assert self.stream is not None
        site = self.graph.final_site
        answers = self.stream.index_select(1, self.answers)
        grad_answers = torch.zeros_like(answers)
        weights = self.active.weights(site, mask)
        grad = _mask_gradient(grad_read[None].contiguous(), answers, weights, grad_answers, self.backend)
        self.active.store(site, grad_mask, grad)
        grad_stream.index_copy_(1, self.answers, grad_answers)


def _mask_gradient(grad_reads: Tensor, stream: Tensor, weights: Tensor, grad_stream: Tensor, backend: str) -> Tensor:
    """Add to the stream's gradient in place; returns the mask's."""
    grad = masked_read_backward_(grad_reads, stream, weights, grad_stream, backend=backend)
    assert grad is not None
    return grad


def _take_heads(heads: Tensor, index: Tensor, num_heads: int) -> Tensor:
    """Some heads' columns of ``[T, H * d_head]``."""
    return heads.unflatten(1, (num_heads, -1)).index_select(1, index).flatten(1)


class _MaskedRunFunction(torch.autograd.Function):
    """The whole masked forward pass as one node: saves the stream, not the activations."""

    @staticmethod
    def forward(ctx, mask: Tensor, run: MaskedRun) -> Tensor:
        needs_backward = ctx.needs_input_grad[0]
        read = run.forward(mask, keep_graphs=needs_backward and not run.recomputes)
        if needs_backward:
            ctx.run = run
            ctx.save_for_backward(mask)
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_read: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return ctx.run.backward(mask, grad_read), None

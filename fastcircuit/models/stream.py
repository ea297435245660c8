"""The disentangled residual stream: one buffer, one masked forward loop, and its backward, as one autograd node.

Writer j's row of the stream is ``D_j = y_j - y~_j``, clean minus ablated; a reader sees

    x_r = base_r + sum_j z_rj D_j          base_r = sum_j y~_j   (DESIGN: the one equation)

Forward fills D block by block without building a graph. Backward walks the blocks in reverse: it recomputes a block
from its reads (or takes up the graph that was kept), differentiates that block alone, and adds into one gradient buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcircuit.graph import Graph, Site
from fastcircuit.models.anatomy import Anatomy, Attention, Block
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States, attend, output_projection
from fastcircuit.ops import masked_read, masked_read_backward_


@dataclass
class MaskedRun:
    """One masked forward pass over T packed tokens, and what its backward needs.

    Args:
        anatomy, graph: the model.
        packing: the batch's tokens.
        embeds: clean outputs of the embedding tables, ``[E, T, d]``.
        ablated: what a removed edge carries.
        answers: packed tokens at which the final read is wanted, ``[N]``, without repeats.
        recompute: recompute each block in backward (one block of activations alive) instead of keeping its graph.
        backend: which ``masked_read`` to use.
    """

    anatomy: Anatomy
    graph: Graph
    packing: Packing
    embeds: Tensor
    ablated: States
    answers: Tensor
    recompute: bool = True
    backend: str = "auto"
    stream: Tensor = field(init=False)
    bases: list[Tensor] = field(init=False, default_factory=list)
    kept: dict[str, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions = self.packing.position_ids
        self.rotary = None if self.anatomy.rotary is None else self.anatomy.rotary(positions)

    def __call__(self, mask: Tensor) -> Tensor:
        """Final read at the answers, ``[N, d]``, for the mask ``z_rj`` of every edge, ``[num_edges]``."""
        return _MaskedRunFunction.apply(mask, self)

    def forward(self, mask: Tensor, keep_graphs: bool) -> Tensor:
        _, tokens, width = self.embeds.shape
        self.stream = self.embeds.new_empty(self.graph.num_writers, tokens, width)
        base = self._write_embeddings()
        for layer, block in enumerate(self.anatomy.blocks):
            self.bases.append(base)
            out = self._run_site(self.graph.attention_site(layer), mask, base, self._attention(block), keep_graphs)
            base = self._write_heads(layer, block.attention, out, base)
            self.bases.append(base)
            out = self._run_site(self.graph.mlp_site(layer), mask, base, self._mlp(block), keep_graphs)
            ablated = self.ablated.mlps[layer]
            torch.sub(out, ablated, out=self.stream[self.graph.mlp_writer(layer)])
            base = base + ablated
        weights = self._weights(self.graph.final_site, mask)
        answers = self.stream.index_select(1, self.answers)
        return masked_read(answers, weights, base.index_select(0, self.answers), backend=self.backend)[0]

    def backward(self, mask: Tensor, grad_read: Tensor) -> Tensor:
        """Gradient of every edge's mask, ``[num_edges]``, from that of the final read, ``[N, d]``."""
        grad_stream = torch.zeros_like(self.stream)
        grad_mask = torch.empty_like(mask)
        self._backward_final_read(mask, grad_read, grad_stream, grad_mask)
        for layer in reversed(range(self.graph.num_layers)):
            block = self.anatomy.blocks[layer]
            grad_out = grad_stream[self.graph.mlp_writer(layer)]
            self._backward_site(self.graph.mlp_site(layer), mask, self._mlp(block), grad_out, grad_stream, grad_mask)
            grad_out = self._head_gradient(layer, block.attention, grad_stream)
            site = self.graph.attention_site(layer)
            self._backward_site(site, mask, self._attention(block), grad_out, grad_stream, grad_mask)
        del self.stream
        return grad_mask

    def _write_embeddings(self) -> Tensor:
        """Write the embedding rows; returns the first base, ``[T, d]``."""
        clean, ablated = self.embeds, self.ablated.embeds.expand_as(self.embeds)
        if self.graph.embedding_nodes == "none":
            return clean.sum(0)
        if self.graph.embedding_nodes == "joint":
            clean, ablated = clean.sum(0, keepdim=True), ablated.sum(0, keepdim=True)
        torch.sub(clean, ablated, out=self.stream[: clean.shape[0]])
        return ablated.sum(0)

    def _write_heads(self, layer: int, attention: Attention, out: Tensor, base: Tensor) -> Tensor:
        """Write the heads' rows from ``out`` ``[T, H * d_head]``; returns the base with the ablated heads added."""
        ablated = self.ablated.heads[layer]
        heads = self.graph.num_heads
        rows = self.stream[self.graph.head_writer(layer) : self.graph.mlp_writer(layer)]
        torch.bmm((out - ablated).unflatten(1, (heads, -1)).transpose(0, 1), attention.out_weight, out=rows)
        written = ablated @ output_projection(attention)
        if attention.out_bias is not None:
            if self.ablated.has_output_bias:
                written = written + attention.out_bias
            else:
                rows += attention.out_bias / heads
        return base + written

    def _head_gradient(self, layer: int, attention: Attention, grad_stream: Tensor) -> Tensor:
        """Gradient at the heads' outputs ``[T, H * d_head]`` from that of their rows in the stream."""
        rows = grad_stream[self.graph.head_writer(layer) : self.graph.mlp_writer(layer)]
        return torch.bmm(rows, attention.out_weight.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _attention(self, block: Block) -> Callable[[Tensor], Tensor]:
        attention, heads, kv = block.attention, self.graph.num_heads, self.graph.num_kv_heads

        def run(reads: Tensor) -> Tensor:
            query, key, value = attention.norm(reads).split((heads, kv, kv))
            return attend(attention, query, key, value, self.rotary, self.packing, self.anatomy.causal)

        return run

    @staticmethod
    def _mlp(block: Block) -> Callable[[Tensor], Tensor]:
        return lambda reads: block.mlp(block.mlp_norm(reads[0]))

    def _weights(self, site: Site, mask: Tensor) -> Tensor:
        return site.view(mask)

    def _read(self, site: Site, mask: Tensor, base: Tensor) -> Tensor:
        return masked_read(self.stream[: site.num_writers], self._weights(site, mask), base, backend=self.backend)

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
        component: Callable[[Tensor], Tensor],
        grad_out: Tensor,
        grad_stream: Tensor,
        grad_mask: Tensor,
    ) -> None:
        base = self.bases.pop()
        if site.name in self.kept:
            reads, out = self.kept.pop(site.name)
        else:
            reads = self._read(site, mask, base)
            with torch.enable_grad():
                out = component(reads.requires_grad_())
        (grad_reads,) = torch.autograd.grad(out, reads, grad_out)
        del reads, out
        site.view(grad_mask).copy_(
            masked_read_backward_(
                grad_reads,
                self.stream[: site.num_writers],
                self._weights(site, mask),
                grad_stream[: site.num_writers],
                backend=self.backend,
            )
        )

    def _backward_final_read(self, mask: Tensor, grad_read: Tensor, grad_stream: Tensor, grad_mask: Tensor) -> None:
        site = self.graph.final_site
        answers = self.stream.index_select(1, self.answers)
        grad_answers = torch.zeros_like(answers)
        grad = masked_read_backward_(
            grad_read[None].contiguous(), answers, self._weights(site, mask), grad_answers, backend=self.backend
        )
        site.view(grad_mask).copy_(grad)
        grad_stream.index_copy_(1, self.answers, grad_answers)


class _MaskedRunFunction(torch.autograd.Function):
    """The whole masked forward pass as one node: saves the stream, not the activations."""

    @staticmethod
    def forward(ctx, mask: Tensor, run: MaskedRun) -> Tensor:
        needs_backward = ctx.needs_input_grad[0]
        read = run.forward(mask, keep_graphs=needs_backward and not run.recompute)
        if needs_backward:
            ctx.run = run
            ctx.save_for_backward(mask)
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_read: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return ctx.run.backward(mask, grad_read), None

"""The disentangled residual stream: one buffer, one masked forward loop, and its backward, as one autograd node.

Writer j's row of the stream is ``D_j = y_j - y~_j``, clean minus ablated; a reader sees

    x_r = base_r + sum_j z_rj D_j          base_r = sum_j y~_j

Forward fills D block by block without building a graph. Backward walks the blocks in reverse: it recomputes a block
from its reads (or takes up the graph that was kept), differentiates it alone, and adds into one gradient buffer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcircuit.graph import Graph, Site
from fastcircuit.models.active import Active
from fastcircuit.models.alive import Alive
from fastcircuit.models.anatomy import Anatomy, Attention, NoNorm, Norm
from fastcircuit.models.changing import Changing
from fastcircuit.models.components import AttentionRun, LayerRun, MlpRun
from fastcircuit.models.gate import Gate, product_
from fastcircuit.models.inputs import FusedReads, Inputs, KeptReads
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States, attend, output_projection
from fastcircuit.models.trunk import Trunk
from fastcircuit.ops import masked_read, masked_read_backward_
from fastcircuit.ops.backends import is_compiled
from fastcircuit.ops.recycling import POOL

# Readers' inputs up to this size are kept for backward rather than computed twice.
KEEP_BYTES = 2**30
# Inputs of a layer that are larger than this are made for queries, keys and values one after the other, each of which
# reads the stream again.
TOGETHER_BYTES = 2**30


def recomputes_by_size(graph: Graph, read_bytes: int) -> bool:
    """Whether blocks are recomputed in backward when it was not said; ``read_bytes`` are those of a reader's input."""
    return graph.num_readers * read_bytes > KEEP_BYTES


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
        on_device: with ``skip_zeros``, find out what to leave out without the host, so that shapes and launches stay
            the same; only where ``fused``.
        backend: which kernels to use.
        fused: read and normalise in one pass; None: where there is a kernel for it.
        gated: with ``on_device``, whether projections of heads and MLPs are left out as well; None: where that pays
            (see :func:`fastcircuit.ops.live_product.pays`).
        trunk: keep the lower layers there, or start from those that are kept. (A run that starts from them has no
            backward.)
        changing: the S tokens that can differ from the ablated run, the answers among them; the stream has those alone.
            None: all of them, S is T.
    """

    anatomy: Anatomy
    graph: Graph
    packing: Packing
    embeds: Tensor
    ablated: States
    answers: Tensor
    recompute: bool | None = None
    skip_zeros: bool = False
    on_device: bool = False
    backend: str = "auto"
    fused: bool | None = None
    gated: bool | None = None
    trunk: Trunk | None = None
    changing: Changing | None = None
    active: Active = field(init=False)
    alive: Alive | None = field(init=False, default=None)
    stream: Tensor | None = field(init=False, default=None)
    _top: Tensor | None = field(init=False, default=None)
    _layers: list[LayerRun] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        positions = self.packing.position_ids
        self.rotary = None if self.anatomy.rotary is None else self.anatomy.rotary(positions)
        self._changing_ablated, self._places = self.ablated, self.answers
        if self.changing is not None:
            self._changing_ablated = self.ablated.take(self.changing.tokens)
            self._places = self.changing.places(self.answers)

    def __call__(self, mask: Tensor) -> Tensor:
        """Final read at the answers, ``[N, d]``, for the mask ``z_rj`` of every edge, ``[num_edges]``."""
        return _MaskedRunFunction.apply(mask, self)

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed in backward; decided by the size of all readers' inputs unless it was said."""
        if self.recompute is not None:
            return self.recompute
        return recomputes_by_size(self.graph, self._num_tokens * self.embeds.shape[2] * self.embeds.element_size())

    @property
    def _num_tokens(self) -> int:
        """S: rows of the stream have so many tokens."""
        return self.embeds.shape[1] if self.changing is None else len(self.changing.tokens)

    def _at_changing(self, values: Tensor) -> Tensor:
        """``[..., T, d]`` at the tokens that can change, ``[..., S, d]``; an axis of size 1 holds for every token."""
        if self.changing is None or values.shape[-2] == 1:
            return values
        return values.index_select(-2, self.changing.tokens)

    def forward(self, mask: Tensor, keep_graphs: bool) -> Tensor:
        if self.fused is None:
            self.fused = is_compiled("read_norm", self.backend, self.embeds, mask)
        self.active = self._find_active(mask)
        if self.skip_zeros and self.on_device and self.fused:
            self.alive = Alive(self.graph, mask, self.backend)
        below_top = self.active.row(self.graph.head_writer(self.graph.num_layers - 1))
        self.stream = POOL.empty((below_top, self._num_tokens, self.embeds.shape[2]), self.embeds)
        first, base = self._start()
        bases = [base]
        for layer in range(first, self.graph.num_layers - 1):
            written = self._ablated_heads(layer, self.ablated)
            run = LayerRun(self._at_changing(base), self._at_changing(written), self._at_others(base))
            self._run_layer(layer, run, mask, self._changing_ablated, keep_graphs)
            base = base + written + self.ablated.mlps[layer]
            bases.append(base)
            self._layers.append(run)
            if not keep_graphs:
                run.drop_graphs()
        if self.trunk is not None and self.trunk.layer is None:
            self.trunk.active, self.trunk.stream, self.trunk.bases = self.active, self.stream, tuple(bases)
        return self._forward_top(mask, base, keep_graphs)

    def backward(self, mask: Tensor, grad_read: Tensor) -> Tensor:
        """Gradient of every edge's mask, ``[num_edges]``, from that of the final read, ``[N, d]``."""
        if self.stream is None:
            raise RuntimeError("the masked forward pass keeps its stream for one backward only; run it again")
        grad_stream = POOL.empty(self.stream.shape, self.stream).zero_()
        grad_mask = torch.zeros_like(mask)
        run = self._layers.pop()
        if not run.has_graphs:
            self._run_top(run, mask, None, keep_graphs=True)
        self._backward_top(run, mask, grad_read, grad_stream, grad_mask)
        for layer in reversed(range(self.graph.num_layers - 1)):
            run = self._layers.pop()
            if not run.has_graphs:
                self._run_layer(layer, run, mask, None, keep_graphs=True)
            self._backward_layer(layer, run, mask, grad_stream, grad_mask)
        self.stream = self._top = None
        return grad_mask

    def _at_others(self, base: Tensor) -> Tensor | None:
        """A base ``[T, d]`` at the tokens that cannot change, ``[T - S, d]``; None when all can."""
        return None if self.changing is None else base.index_select(0, self.changing.others)

    def _find_active(self, mask: Tensor) -> Active:
        """What has to be computed; from a trunk on, what it had to."""
        if self.trunk is not None and self.trunk.layer is not None:
            assert self.trunk.active is not None
            return self.trunk.active.for_other_masks()
        on = (mask != 0).cpu().numpy() if self.skip_zeros and not self.on_device else None
        return Active(self.graph, on, mask.device)

    def _start(self) -> tuple[int, Tensor]:
        """The first layer to run, with the rows below it written, and its base ``[T, d]``, at every token."""
        if self.trunk is None or self.trunk.layer is None:
            return 0, self._write_embeddings()
        layer = self.trunk.layer
        self._rows_before(self.stream, layer).copy_(self._rows_before(self.trunk.stream, layer))
        return layer, self.trunk.bases[layer]

    def _write_embeddings(self) -> Tensor:
        """Write the embedding rows; returns the first base, ``[T, d]``."""
        clean, ablated = self.embeds, self.ablated.embeds.expand_as(self.embeds)
        base = ablated.sum(0)
        if self.graph.embedding_nodes == "none":
            return clean.sum(0)
        if self.graph.embedding_nodes == "joint":
            clean, ablated = clean.sum(0, keepdim=True), base[None]
        clean, ablated = self._at_changing(clean), self._at_changing(ablated)
        for writer in range(clean.shape[0]):
            if self.active.is_live(writer):
                torch.sub(clean[writer], ablated[writer], out=self._row(self.stream, writer))
        return base

    def _run_layer(self, layer: int, run: LayerRun, mask: Tensor, ablated: States | None, keep_graphs: bool) -> None:
        """Run a layer's live parts, and write their rows; without ``ablated`` those are written already.

        The heads' reads and what the MLP reads of earlier layers are one ``masked_read``: they share the stream.
        """
        readers, block = self.active.num_attention_readers(layer), self.anatomy.blocks[layer]
        stream, heads = self._rows_before(self.stream, layer), self._head_rows(self.stream, layer)
        weights = self.active.layer_weights(layer, mask)
        if readers:
            run.attention = self._attention(layer, run, stream, weights, plain=len(weights) - readers)
            out = run.attention.forward(keep_graphs)
            if ablated is not None:
                self._write_heads(layer, out, ablated, heads)
        if self.active.is_live(self.graph.mlp_writer(layer)):
            if run.attention is not None:
                read = run.attention.rest() + run.written
                of_heads = self.active.mlp_head_weights(layer, mask)
                inputs = self._inputs(self.graph.mlp_site(layer), block.mlp_norm, heads, of_heads, read[0])
            else:
                read = masked_read(stream, weights, run.base, backend=self.backend)
                inputs = KeptReads(block.mlp_norm, read + run.written, backend=self.backend)
            run.mlp = MlpRun(block, inputs)
            out = run.mlp.forward(keep_graphs)
            if ablated is not None:
                torch.sub(out, ablated.mlps[layer], out=self._row(self.stream, self.graph.mlp_writer(layer)))

    def _backward_layer(self, layer: int, run: LayerRun, mask: Tensor, grad_stream: Tensor, grad_mask: Tensor) -> None:
        """Differentiate a layer alone, and pass its gradient on to the masks and rows it reads."""
        weights = self.active.layer_weights(layer, mask)
        readers = self.active.num_attention_readers(layer)
        heads, grad_heads = self._head_rows(self.stream, layer), self._head_rows(grad_stream, layer)
        of_mlp = of_heads = None
        if run.mlp is not None:
            of_mlp = run.mlp.backward(self._row(grad_stream, self.graph.mlp_writer(layer)))
            if readers:
                to_heads, live = self.active.mlp_head_weights(layer, mask), run.mlp.inputs.live
                of_heads = self._add_gradients([of_mlp], [live], heads, to_heads, grad_heads)
        grad_reads: Iterable[Tensor] = [] if of_mlp is None else [of_mlp]
        lists: Sequence[Tensor | None] = [None]
        if run.attention is not None:
            grad_reads = run.attention.backward(self._grad_heads_out(layer, grad_heads), of_mlp)
            lists = [inputs.live for inputs in run.attention.inputs]
        stream, grad = self._rows_before(self.stream, layer), self._rows_before(grad_stream, layer)
        grad_weights = self._add_gradients(grad_reads, lists, stream, weights, grad)
        self.active.store_layer(layer, grad_mask, grad_weights, of_heads)

    def _forward_top(self, mask: Tensor, base: Tensor, keep_graphs: bool) -> Tensor:
        """The last layer and the final read: what they write is wanted at the answers alone, so it has N tokens."""
        assert self.stream is not None
        ablated, answers = self.ablated.last_layer(self.answers), self.answers
        at_answers = base.index_select(0, answers) + self._ablated_heads(self.graph.num_layers - 1, ablated)
        run = LayerRun(self._at_changing(base), at_answers, self._at_others(base))
        self._top = self.stream.new_empty(self.active.num_writers, len(answers), self.stream.shape[2])
        torch.index_select(self.stream, 1, self._places, out=self._top[: len(self.stream)])
        self._run_top(run, mask, ablated, keep_graphs)
        self._layers.append(run)
        if not keep_graphs:
            run.drop_graphs()
        weights, base = self.active.weights(self.graph.final_site, mask), at_answers + ablated.mlps[-1]
        (live,) = self._lists(self.graph.final_site, [weights])
        return masked_read(self._top, weights, base, live=live, backend=self.backend)[0]

    def _run_top(self, run: LayerRun, mask: Tensor, ablated: States | None, keep_graphs: bool) -> None:
        """Run the last layer's live parts, and write their rows; without ``ablated`` those are written already."""
        assert self._top is not None
        assert self.stream is not None
        layer, graph, active = self.graph.num_layers - 1, self.graph, self.active
        if active.num_attention_readers(layer):
            weights = active.weights(graph.attention_site(layer), mask)
            run.attention = self._attention(layer, run, self.stream, weights)
            out = run.attention.forward(keep_graphs)
            if ablated is not None:
                out = out.index_select(0, self._places)
                self._write_heads(layer, out, ablated, self._head_rows(self._top, layer))
        if active.is_live(graph.mlp_writer(layer)):
            site, block = graph.mlp_site(layer), self.anatomy.blocks[layer]
            rows, weights = self._top[: active.row(site.num_writers)], active.weights(site, mask)
            run.mlp = MlpRun(block, self._inputs(site, block.mlp_norm, rows, weights, run.written))
            out = run.mlp.forward(keep_graphs)
            if ablated is not None:
                torch.sub(out, ablated.mlps[layer], out=self._row(self._top, graph.mlp_writer(layer)))

    def _backward_top(
        self, run: LayerRun, mask: Tensor, grad_read: Tensor, grad_stream: Tensor, grad_mask: Tensor
    ) -> None:
        """Differentiate the final read and the last layer; ``grad_stream`` is still all zero."""
        assert self._top is not None
        assert self.stream is not None
        layer, top, grad_top = self.graph.num_layers - 1, self._top, torch.zeros_like(self._top)
        site = self.graph.final_site
        lists = self._lists(site, [self.active.weights(site, mask)])
        self._backward_site(site, mask, [grad_read[None].contiguous()], lists, top, grad_top, grad_mask)
        if run.mlp is not None:
            grad = run.mlp.backward(self._row(grad_top, self.graph.mlp_writer(layer)))
            site, lists = self.graph.mlp_site(layer), [run.mlp.inputs.live]
            self._backward_site(site, mask, [grad], lists, top, grad_top, grad_mask)
        grad_stream.index_copy_(1, self._places, grad_top[: len(grad_stream)])
        if run.attention is not None:
            grad_answers = self._grad_heads_out(layer, self._head_rows(grad_top, layer))
            grad_out = grad_answers.new_zeros(grad_stream.shape[1], grad_answers.shape[1])
            grad_out.index_copy_(0, self._places, grad_answers)
            grad_reads, lists = run.attention.backward(grad_out), [inputs.live for inputs in run.attention.inputs]
            site = self.graph.attention_site(layer)
            self._backward_site(site, mask, grad_reads, lists, self.stream, grad_stream, grad_mask)

    def _backward_site(
        self,
        site: Site,
        mask: Tensor,
        grad_reads: Iterable[Tensor],
        lists: Sequence[Tensor | None],
        stream: Tensor,
        grad_stream: Tensor,
        grad_mask: Tensor,
    ) -> None:
        """Pass the gradient of a site's reads on to the masks and rows it reads."""
        rows = self.active.row(site.num_writers)
        weights = self.active.weights(site, mask)
        grad_weights = self._add_gradients(grad_reads, lists, stream[:rows], weights, grad_stream[:rows])
        self.active.store(site, grad_mask, grad_weights)

    def _lists(self, site: Site, weights: Sequence[Tensor], more: int = 0) -> Sequence[Tensor | None]:
        """What a site's readers, and ``more`` after those, have to read, for each block of them; None: everything."""
        if self.alive is None:
            return [None] * len(weights)
        return self.alive.lists(weights, self.alive.readers(site, more))

    def _inputs(self, site: Site, norm: Norm | NoNorm, stream: Tensor, weights: Tensor, base: Tensor) -> Inputs:
        """What a site's readers see of these rows of the stream, through these masks."""
        (live,) = self._lists(site, [weights])
        return self._read(norm, stream, weights, base, 0, live)

    def _read(
        self, norm: Norm | NoNorm, stream: Tensor, weights: Tensor, base: Tensor, plain: int, live: Tensor | None
    ) -> Inputs:
        gate = None if live is None else self._gate(live[2 + weights.shape[1] :])
        if self.fused and isinstance(norm, Norm):
            return FusedReads(norm, stream, weights, base, plain, live, gate, self.backend)
        reads = masked_read(stream, weights, base, live=live, backend=self.backend)
        return KeptReads(norm, reads, plain, live, gate, self.backend)

    def _gate(self, alive: Tensor) -> Gate:
        """How products leave out the groups whose flag is 0."""
        return Gate(alive, self.backend, self.gated)

    def _heads_gate(self, layer: int) -> Gate | None:
        """Which heads of a layer the output projection is for; None: all."""
        return None if self.alive is None else self._gate(self.alive.heads(layer))

    def _attention_inputs(
        self, layer: int, attention: Attention, base: Tensor, stream: Tensor, weights: Tensor, plain: int
    ) -> list[Inputs]:
        """What a layer's heads and its MLP see; or, where that is large, queries, keys, and the rest, one by one."""
        sizes = [len(weights)]
        if self.fused and len(weights) * base.numel() * base.element_size() > TOGETHER_BYTES:
            queries, keys, values = (projection.heads for projection in attention.projections)
            sizes = [queries, keys, values + plain]
        parts = weights.split(sizes)
        lists = self._lists(self.graph.attention_site(layer), parts, plain)
        return [
            self._read(attention.norm, stream, part, base, plain if part is parts[-1] else 0, live)
            for part, live in zip(parts, lists, strict=True)
        ]

    def _attention(self, layer: int, run: LayerRun, stream: Tensor, weights: Tensor, plain: int = 0) -> AttentionRun:
        """The live heads of a layer, on what they read; ``plain`` more readers share the pass over the stream."""
        attention, head_to_kv = self.anatomy.blocks[layer].attention, None
        if not self.active.everything:
            live = self.active.heads(layer)
            group = self.graph.num_heads // self.graph.num_kv_heads
            groups, head_to_kv = torch.unique(live // group, return_inverse=True)
            attention = attention.take(live, groups)

        heads, causal = None if self.alive is None else self.alive.heads(layer), self.anatomy.causal
        changing = self.changing
        fixed = None
        if changing is not None:
            assert run.fixed_base is not None
            fixed = changing.fixed_keys_values(attention, run.fixed_base)

        def attends(projected: tuple[Tensor, ...]) -> Tensor:
            if changing is not None and fixed is not None:
                projected = changing.everywhere(projected, fixed)
            out = attend(attention, projected, self.rotary, self.packing, causal, head_to_kv, heads, self.backend)
            return self._at_changing(out)

        inputs = self._attention_inputs(layer, attention, run.base, stream, weights, plain)
        return AttentionRun(attention, attends, inputs)

    def _write_heads(self, layer: int, out: Tensor, ablated: States, rows: Tensor) -> None:
        """Write the live heads' ``rows`` from their outputs before the output projection."""
        attention, reference = self.anatomy.blocks[layer].attention, ablated.heads[layer]
        if not self.active.everything:
            reference = _take_heads(reference, self.active.heads(layer), self.graph.num_heads)
        difference = (out - reference).unflatten(1, (rows.shape[0], -1)).transpose(0, 1)
        product_(rows, difference, self._out_weight(layer), self._heads_gate(layer))
        if attention.out_bias is not None and not ablated.has_output_bias:
            rows += attention.out_bias / self.graph.num_heads

    def _grad_heads_out(self, layer: int, grad_rows: Tensor) -> Tensor:
        """Gradient of the live heads' outputs before the output projection, ``[T, n * d_head]``."""
        weight, gate = self._out_weight(layer).transpose(1, 2), self._heads_gate(layer)
        if gate is None or not gate.closes(grad_rows, weight):
            return torch.bmm(grad_rows, weight).transpose(0, 1).flatten(1)
        heads, tokens, width = len(weight), grad_rows.shape[1], weight.shape[2]
        grad = grad_rows.new_empty(tokens, heads, width)
        # Not every kernel of attention leaves out the heads that are not alive: they get 0.
        product_(grad.transpose(0, 1), grad_rows, weight, gate, zeros=True)
        return grad.flatten(1)

    def _ablated_heads(self, layer: int, ablated: States) -> Tensor:
        """What the ablated heads of a layer write together, ``[T, d]`` (or ``[1, d]``)."""
        attention = self.anatomy.blocks[layer].attention
        written = ablated.heads[layer] @ output_projection(attention)
        if attention.out_bias is not None and ablated.has_output_bias:
            written = written + attention.out_bias
        return written

    def _out_weight(self, layer: int) -> Tensor:
        """Output projections of the live heads, ``[n, d_head, d]``."""
        weight = self.anatomy.blocks[layer].attention.out_weight
        return weight if self.active.everything else weight.index_select(0, self.active.heads(layer))

    def _row(self, rows: Tensor | None, writer: int) -> Tensor:
        """A live writer's row, of the stream or of its gradient."""
        assert rows is not None
        return rows[self.active.row(writer)]

    def _rows_before(self, rows: Tensor | None, layer: int) -> Tensor:
        """Rows of the live writers below a layer, of the stream or of its gradient."""
        assert rows is not None
        return rows[: self.active.row(self.graph.head_writer(layer))]

    def _head_rows(self, rows: Tensor | None, layer: int) -> Tensor:
        """Rows of a layer's live heads, of the stream or of its gradient."""
        assert rows is not None
        return rows[self.active.row(self.graph.head_writer(layer)) : self.active.row(self.graph.mlp_writer(layer))]

    def _add_gradients(
        self,
        grad_reads: Iterable[Tensor],
        lists: Sequence[Tensor | None],
        stream: Tensor,
        weights: Tensor,
        grad_stream: Tensor,
    ) -> Tensor:
        """Add to the stream's gradient in place, for some readers after the others; returns the mask's."""
        found: list[Tensor] = []
        first = 0
        for grad, live in zip(grad_reads, lists, strict=False):
            rows, first = weights[first : first + len(grad)], first + len(grad)
            found_here = masked_read_backward_(grad, stream, rows, grad_stream, live=live, backend=self.backend)
            assert found_here is not None
            found.append(found_here)
        if not found:  # nothing of the layer is live
            return torch.zeros_like(weights)
        return found[0] if len(found) == 1 else torch.cat(found)


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

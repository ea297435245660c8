"""The KL of a step in plain torch: the formula of fastcircuit written down for autograd, for torch.compile too.

One stream of differences, clean minus ablated, read through the masks by one einsum per site; autograd keeps what it
needs. What fastcircuit adds to this is kernels, one buffer written in place, and a backward pass of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcircuit.models.anatomy import Anatomy, Attention, NoNorm, Norm
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.states import States
from fastcircuit.ops.reference import rotate

KL = Callable[[Tensor, Tensor, States, Tensor, Tensor], Tensor]


def plain_kl(model: MaskedCausalLM, compiled: bool = False) -> KL:
    """A function that gives the mean KL over the answers of ``B`` unpadded prompts.

    Args:
        model: whose weights, as they are now, are used.
        compiled: by ``torch.compile``, as one graph.

    Returns:
        ``kl(mask, token_ids, ablated, answers, log_probs)``: ``z_rj`` of every edge ``[num_edges]``; tokens ``[B, S]``;
        states with one row per token of the flattened batch; places in it ``[N]``; the full model's, ``[N, V]``.
    """
    # The compiler cannot look into what the graph and the anatomy compute when they are asked.
    anatomy, joint = model.anatomy, model.graph.embedding_nodes == "joint"
    sites = [(site.first_edge, site.num_readers, site.num_writers) for site in model.graph.sites]

    def kl(mask: Tensor, token_ids: Tensor, ablated: States, answers: Tensor, log_probs: Tensor) -> Tensor:
        batch, length = token_ids.shape
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        rotary = None if anatomy.rotary is None else anatomy.rotary(positions)
        masks = [mask[first : first + r * w].view(r, w) for first, r, w in sites]
        clean = torch.stack(anatomy.embed(token_ids.flatten(), positions))
        rows = [(clean - ablated.embeds).sum(0, keepdim=True) if joint else clean - ablated.embeds]
        base = ablated.embeds.sum(0)
        for layer, block in enumerate(anatomy.blocks):
            attention = block.attention
            out = _attend(anatomy, attention, _read(rows, base, masks[2 * layer]), rotary, batch)
            heads = attention.out_weight.shape[0]
            difference = (out - ablated.heads[layer]).unflatten(1, (heads, -1)).transpose(0, 1)
            rows.append(torch.bmm(difference, attention.out_weight))
            base = base + ablated.heads[layer] @ attention.out_weight.flatten(0, 1)
            if attention.out_bias is not None:
                base = base + attention.out_bias
            read = _read(rows, base, masks[2 * layer + 1])[0]
            rows.append((block.mlp(_norm(block.mlp_norm, read)) - ablated.mlps[layer])[None])
            base = base + ablated.mlps[layer]
        final = _read(rows, base, masks[-1])[0].index_select(0, answers)
        own = torch.log_softmax(anatomy.unembed(_norm(anatomy.final_norm, final)).to(log_probs.dtype), dim=-1)
        return F.kl_div(own, log_probs, reduction="none", log_target=True).sum(-1).mean()

    if not compiled:
        return kl
    torch.compiler.reset()  # of one function only a few variants are compiled, and the others run eagerly
    return torch.compile(kl, fullgraph=True, dynamic=False)


def _read(rows: list[Tensor], base: Tensor, mask: Tensor) -> Tensor:
    stream = torch.cat(rows)
    return base + torch.einsum("rw,wtd->rtd", mask.to(stream.dtype), stream)


def _norm(norm: Norm | NoNorm, x: Tensor) -> Tensor:
    """The norm by torch's own functions."""
    if isinstance(norm, NoNorm):
        return x
    if norm.centered:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _attend(
    anatomy: Anatomy, attention: Attention, reads: Tensor, rotary: tuple[Tensor, Tensor] | None, batch: int
) -> Tensor:
    """``[readers, T, d]`` to ``[T, H * d_head]`` within prompts of equal length."""
    parts = _norm(attention.norm, reads).split([part.heads for part in attention.projections])
    projected = [projection(part) for projection, part in zip(attention.projections, parts, strict=True)]
    if rotary is not None:
        projected[:2] = [rotate(part, *rotary) for part in projected[:2]]
    query, key, value = (part.unflatten(1, (batch, -1)).transpose(0, 1) for part in projected)
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=anatomy.causal, scale=attention.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)

"""The gradient of a step in plain torch: the formula of fastcircuit written down for autograd, for torch.compile too.

One stream of differences, clean minus ablated, read through the masks by one einsum per site; autograd keeps what it
needs. What fastcircuit adds to this is kernels, one buffer written in place, and a backward pass of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcircuit.graph import Site
from fastcircuit.models.anatomy import Anatomy, Attention
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.states import States
from fastcircuit.ops.reference import rotate


def plain_kl(
    model: MaskedCausalLM,
    mask: Tensor,
    token_ids: Tensor,
    ablated: States,
    answers: Tensor,
    log_probs: Tensor,
) -> Tensor:
    """Mean KL over the answers of ``B`` unpadded prompts.

    Args:
        mask: ``z_rj`` of every edge, ``[num_edges]``.
        token_ids: ``[B, S]``.
        ablated: one row per token of the flattened batch.
        answers: places in the flattened batch, ``[N]``.
        log_probs: the full model's, ``[N, V]``.
    """
    anatomy, graph = model.anatomy, model.graph
    batch, length = token_ids.shape
    positions = torch.arange(length, device=token_ids.device).repeat(batch)
    rotary = None if anatomy.rotary is None else anatomy.rotary(positions)
    clean = torch.stack(anatomy.embed(token_ids.flatten(), positions))
    joint = graph.embedding_nodes == "joint"
    rows = [(clean - ablated.embeds).sum(0, keepdim=True) if joint else clean - ablated.embeds]
    base = ablated.embeds.sum(0)
    for layer, block in enumerate(anatomy.blocks):
        attention = block.attention
        reads = attention.norm(_read(rows, base, graph.attention_site(layer), mask))
        heads = [part.heads for part in attention.projections]
        parts = zip(attention.projections, reads.split(heads), strict=True)
        query, key, value = (projection(part) for projection, part in parts)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = _attend(attention, anatomy, query, key, value, batch)
        difference = (out - ablated.heads[layer]).unflatten(1, (graph.num_heads, -1)).transpose(0, 1)
        rows.append(torch.bmm(difference, attention.out_weight))
        base = base + ablated.heads[layer] @ attention.out_weight.flatten(0, 1)
        if attention.out_bias is not None:
            base = base + attention.out_bias
        read = _read(rows, base, graph.mlp_site(layer), mask)[0]
        rows.append((block.mlp(block.mlp_norm(read)) - ablated.mlps[layer])[None])
        base = base + ablated.mlps[layer]
    final = _read(rows, base, graph.final_site, mask)[0].index_select(0, answers)
    own = torch.log_softmax(anatomy.unembed(anatomy.final_norm(final)).to(log_probs.dtype), dim=-1)
    return F.kl_div(own, log_probs, reduction="none", log_target=True).sum(-1).mean()


def _read(rows: list[Tensor], base: Tensor, site: Site, mask: Tensor) -> Tensor:
    stream = torch.cat(rows)
    return base + torch.einsum("rw,wtd->rtd", site.view(mask).to(stream.dtype), stream)


def _attend(attention: Attention, anatomy: Anatomy, query: Tensor, key: Tensor, value: Tensor, batch: int) -> Tensor:
    """``[H, T, d_head]`` to ``[T, H * d_head]`` within prompts of equal length."""
    query, key, value = (part.unflatten(1, (batch, -1)).transpose(0, 1) for part in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=anatomy.causal, scale=attention.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)

"""Cost model of the published EAP and EAP-IG (hannamw/EAP-IG on TransformerLens), on the weights of a GPT-2.

- The model runs hooked: the input of a block is copied once per head for queries, for keys and for values,
  ``[B, S, H, d]`` each; the norm, its scale folded into the weights, is written out on every copy; projections are per
  head; attention is eager; every head's result ``[B, S, H, d]`` is the sum of a broadcast product ``[B, S, H,
  d_head, d]``; the MLP reads a copy; logits are computed at every position.
- One buffer ``[B, S, F, d]`` holds corrupted minus clean of all F writers.
- Three forward passes for EAP: corrupted, clean (for the metric), clean again with the graph. EAP-IG: corrupted, clean,
  and one with the graph per point.
- In the backward pass every copy's gradient meets all earlier writers in one einsum.
- The gradients of all weights are computed too, and thrown away.

Left out, in its favour: hooks that do nothing, and the gradient of the embeddings.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

Metric = Callable[[Tensor, Tensor], Tensor]


class PublishedAttribution:
    """Scores ``[F, R]`` of writers by readers: input, then every layer's heads and MLP; q, k, v of every head, the MLP.

    Args:
        metric: ``(logits, clean_logits)``, both ``[B, S, V]``, to a scalar, summed over examples.
    """

    def __init__(self, model: GPT2LMHeadModel, metric: Metric) -> None:
        model.requires_grad_(False)
        self.body, self.unembed, self.metric = model.transformer, model.lm_head.weight, metric
        config = model.config
        self.layers, self.heads, self.width = config.n_layer, config.n_head, config.n_embd
        self.writers = 1 + self.layers * (self.heads + 1)
        self.readers = self.layers * (3 * self.heads + 1) + 1
        self.blocks = [self._folded(block) for block in self.body.h]
        norm = self.body.ln_f
        self.final = (self.unembed * norm.weight).T.contiguous(), norm.bias @ self.unembed.T, norm.eps
        for weight in (*(weight for block in self.blocks for weight in block.values()), *self.final[:2]):
            weight.requires_grad_()

    def eap(self, clean: Tensor, corrupted: Tensor) -> Tensor:
        """At the clean run; ids ``[B, S]``."""
        scores, difference = self._new(clean)
        with torch.no_grad():
            self._forward(self._embed(corrupted), difference, 1)
            clean_logits = self._forward(self._embed(clean))
        logits = self._forward(self._embed(clean).requires_grad_(), difference, -1, scores)
        self.metric(logits, clean_logits).backward()
        return scores / len(clean)

    def eap_ig(self, clean: Tensor, corrupted: Tensor, steps: int) -> Tensor:
        """Averaged over ``k / steps`` of the way from the corrupted embeddings to the clean ones, k from 0."""
        scores, difference = self._new(clean)
        ends = self._embed(corrupted), self._embed(clean)
        with torch.no_grad():
            self._forward(ends[0], difference, 1)
            clean_logits = self._forward(ends[1], difference, -1)
        for step in range(steps):
            mixed = (ends[0] + step / steps * (ends[1] - ends[0])).requires_grad_()
            logits = self._forward(mixed, difference, 0, scores)
            self.metric(logits, clean_logits).backward()
        return scores / (len(clean) * steps)

    def edge_scores(self, scores: Tensor) -> np.ndarray:
        """``[num_edges]`` in the order of a graph with joint embedding nodes."""
        parts = []
        for layer in range(self.layers):
            first, read = 1 + layer * (self.heads + 1), layer * (3 * self.heads + 1)
            parts.append(scores[:first, read : read + 3 * self.heads].T)
            parts.append(scores[: first + self.heads, read + 3 * self.heads])
        parts.append(scores[:, -1])
        return torch.cat([part.flatten() for part in parts]).numpy()

    def _new(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.unembed
        return (
            weight.new_zeros(self.writers, self.readers),
            weight.new_zeros(*ids.shape, self.writers, self.width),
        )

    def _embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.body.wte(ids) + self.body.wpe(torch.arange(ids.shape[1], device=ids.device))

    def _folded(self, block) -> dict[str, Tensor]:
        """A block's weights with its norms' scales and shifts folded in."""
        attn, mlp, heads = block.attn, block.mlp, self.heads
        with torch.no_grad():
            qkv = attn.c_attn.weight.view(self.width, 3, heads, -1).permute(1, 2, 0, 3)  # [3, H, d, d_head]
            shift = attn.c_attn.bias.view(3, heads, -1) + torch.einsum("d,phde->phe", block.ln_1.bias, qkv)
            return {
                "qkv": (qkv * block.ln_1.weight[:, None]).contiguous(),
                "qkv_bias": shift,
                "out": attn.c_proj.weight.detach().view(heads, -1, self.width),
                "out_bias": attn.c_proj.bias.detach(),
                "in": block.ln_2.weight[:, None] * mlp.c_fc.weight,
                "in_bias": mlp.c_fc.bias + block.ln_2.bias @ mlp.c_fc.weight,
                "mlp_out": mlp.c_proj.weight.detach(),
                "mlp_bias": mlp.c_proj.bias.detach(),
            }

    def _norm(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.final[2]).sqrt()

    def _forward(
        self, stream: Tensor, difference: Tensor | None = None, sign: int = 0, scores: Tensor | None = None
    ) -> Tensor:
        """Logits ``[B, S, V]``; adds ``sign`` times every output to ``difference``; scores in the backward pass."""

        def note(first: int, out: Tensor) -> None:
            if difference is not None and sign:
                rows = out.detach() if out.dim() == 4 else out.detach()[:, :, None]
                difference[:, :, first : first + rows.shape[2]] += sign * rows

        def watch(x: Tensor, seen: int, first: int) -> Tensor:
            if scores is not None:
                assert difference is not None
                rows = difference[:, :, :seen]
                x.register_hook(lambda grad: self._score(scores, rows, grad, first))
            return x

        note(0, stream)
        for layer, weights in enumerate(self.blocks):
            first, read = 1 + layer * (self.heads + 1), layer * (3 * self.heads + 1)
            copies = [
                watch(stream[:, :, None].expand(-1, -1, self.heads, -1).clone(), first, read + part * self.heads)
                for part in range(3)
            ]
            heads = self._attention(weights, copies)
            note(first, heads)
            stream = stream + heads.sum(2) + weights["out_bias"]
            middle = watch(stream.clone(), first + self.heads, read + 3 * self.heads)
            hidden = self._norm(middle) @ weights["in"] + weights["in_bias"]
            out = torch.nn.functional.gelu(hidden, approximate="tanh") @ weights["mlp_out"] + weights["mlp_bias"]
            note(first + self.heads, out)
            stream = stream + out
        stream = watch(stream.clone(), self.writers, self.readers - 1)
        return self._norm(stream) @ self.final[0] + self.final[1]

    def _attention(self, weights: dict[str, Tensor], copies: list[Tensor]) -> Tensor:
        """What every head writes, without the output bias, ``[B, S, H, d]``."""
        query, key, value = (
            torch.einsum("bshd,hde->bshe", self._norm(x), weights["qkv"][part]) + weights["qkv_bias"][part]
            for part, x in enumerate(copies)
        )
        scores = torch.einsum("bqhe,bkhe->bhqk", query, key) / query.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        pattern = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, value)
        return (mixed[..., None] * weights["out"]).sum(-2)

    @staticmethod
    def _score(scores: Tensor, difference: Tensor, grad: Tensor, first: int) -> None:
        if grad.dim() == 3:
            grad = grad[:, :, None]
        products = torch.einsum("bsfd,bsrd->fr", difference, grad)
        scores[: products.shape[0], first : first + products.shape[1]] += products

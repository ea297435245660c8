"""The training step of the published Edge Pruning implementation, in plain torch: what fastcircuit is timed against.

A cost model with the right answer. It does the same tensor operations on the same shapes as the published GPT-2 and
Llama code, on the weights of a Hugging Face model, so that it needs neither that code nor its old dependencies:

- the stream is a dense ``[W, B, S, d]`` tensor; a layer's heads, and then its MLP, are scattered into a tensor of that
  size which is added to the stream, so autograd keeps 2 L + 1 versions of it;
- every read mixes all W rows (rows that are not written yet have mask 0), q, k and v separately, and the clean and the
  corrupted stream separately;
- norms and q/k/v projections run on materialised ``[H, B, S, d]`` inputs; attention is eager; W_O is applied per head;
- logits are computed for the full vocabulary at every position, padding included;
- every step runs the full model twice more, in the same disentangled form: on the clean and on the corrupted tokens;
- masks are drawn per log-alpha tensor on the CPU; the full model's masks cost one ``.item()`` per tensor and run.

Masks, penalty, optimiser and schedules are the published ones: Bhaskar et al. 2024, "Finding Transformer Circuits with
Edge Pruning", section 3, and the facts of its code (gradients clipped jointly at norm 1, weight decay on everything).

Differences that do not change the cost: the full model shares its weights with the student (the published code loads
them twice), its masks are exactly 1 (not 1 - 6e-6), and a Llama's embedding mask receives its gradient.
Its time and memory were measured against the original: NOTES.md.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcircuit.graph import Graph

TEMPERATURE, LOW, HIGH, EPSILON, SOFTNESS = 2 / 3, -0.1, 1.1, 1e-6, 0.8
Masks = Mapping[str, Tensor]


def sample_mask(log_alpha: Tensor) -> Tensor:
    """Hard-concrete sample clamp(1.2 sigmoid((logit u + a) / T) - 0.1, 0, 1), with u drawn on the CPU and copied."""
    u = torch.empty(log_alpha.shape).uniform_(EPSILON, 1 - EPSILON).to(log_alpha.device, log_alpha.dtype)
    stretched = (HIGH - LOW) * torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / TEMPERATURE) + LOW
    return F.hardtanh(stretched, 0, 1)


def expected_mask(log_alpha: Tensor) -> Tensor:
    """The mask outside training: sigmoid(0.8 a / T), with its round(E[#zeros]) smallest entries set to 0."""
    logit = torch.logit(torch.tensor(-LOW / (HIGH - LOW), dtype=torch.float64)).item()
    p_zero = torch.sigmoid(TEMPERATURE * logit - log_alpha).clamp(EPSILON, 1 - EPSILON)
    zeros = int(torch.round(log_alpha.numel() - torch.sum(1 - p_zero)).item())
    mask = torch.sigmoid(SOFTNESS * log_alpha / TEMPERATURE).flatten()
    if zeros:
        mask[torch.topk(mask, zeros, largest=False).indices] = 0
    return mask.view_as(log_alpha)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax(q k^T scale) v with a materialised score matrix; q, k, v ``[B, H, S, d_head]``."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = torch.where(causal, scores, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, -1), v)


class _GPT2:
    """The parts of a Hugging Face GPT-2, one input per head. Inputs of q, k, v are ``[H, B, S, d]``."""

    def __init__(self, model: Any) -> None:
        self.body, self.blocks = model.transformer, model.transformer.h
        self.final_norm, self.unembed = self.body.ln_f, model.lm_head

    def embeddings(self, ids: Tensor, split: bool) -> list[Tensor]:
        tokens = self.body.wte(ids)
        positions = self.body.wpe(torch.arange(ids.shape[1], device=ids.device)[None]).expand_as(tokens)
        return [tokens, positions] if split else [tokens + positions]

    def attention(self, layer: int, q_in: Tensor, k_in: Tensor, v_in: Tensor) -> Tensor:
        block = self.blocks[layer]
        attn, width, heads = block.attn, q_in.shape[-1], q_in.shape[0]
        weight = attn.c_attn.weight.view(width, 3, heads, -1)
        bias = attn.c_attn.bias.view(3, 1, heads, 1, -1)
        q, k, v = (
            torch.einsum("hbsd,dhe->bhse", x, weight[:, i]) + bias[i]
            for i, x in enumerate((block.ln_1(q_in), block.ln_1(k_in), block.ln_1(v_in)))
        )
        mixed = eager_attention(q, k, v, attn.scaling)
        per_head = torch.einsum("bhse,hed->hbsd", mixed, attn.c_proj.weight.view(heads, -1, width))
        return per_head + attn.c_proj.bias / heads

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self.blocks[layer].mlp
        return mlp.c_proj(mlp.act(mlp.c_fc(self.blocks[layer].ln_2(x))))


class _Llama:
    """The same parts of a Hugging Face Llama; k and v have one input per key/value head."""

    def __init__(self, model: Any) -> None:
        self.body, self.blocks = model.model, model.model.layers
        self.final_norm, self.unembed = self.body.norm, model.lm_head

    def embeddings(self, ids: Tensor, split: bool) -> list[Tensor]:
        return [self.body.embed_tokens(ids)]

    def attention(self, layer: int, q_in: Tensor, k_in: Tensor, v_in: Tensor) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        block = self.blocks[layer]
        attn, width, heads = block.self_attn, q_in.shape[-1], q_in.shape[0]
        norm = block.input_layernorm
        q, k, v = (
            torch.einsum("hbsd,hed->hbse", norm(x), project.weight.view(x.shape[0], -1, width)).transpose(0, 1)
            for project, x in ((attn.q_proj, q_in), (attn.k_proj, k_in), (attn.v_proj, v_in))
        )
        cos, sin = self.body.rotary_emb(v, torch.arange(q.shape[2], device=q.device)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        group = heads // k.shape[1]
        mixed = eager_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn.scaling)
        return torch.einsum("bhse,dhe->hbsd", mixed, attn.o_proj.weight.view(width, heads, -1))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        return self.blocks[layer].mlp(self.blocks[layer].post_attention_layernorm(x))


class PublishedEdgePruning:
    """Edge Pruning of ``hf_model`` at the cost of the published code.

    Example:
        >>> step = PublishedEdgePruning(hf_model)
        >>> loss = step.training_step({"input_ids": ids, "corrupted_input_ids": corrupted, "start": start, "end": end})

    Args:
        hf_model: a ``GPT2LMHeadModel`` or ``LlamaForCausalLM``; its weights are used as they are, and frozen.
        embedding_nodes: mask the embeddings too (two writers in GPT-2, one in Llama); otherwise they are always kept.
        edge_target, node_target: sparsities to reach; above 1 pushes harder.
        learning_rate, lambda_learning_rate: of the log-alphas, and of the Lagrange multipliers (gradient ascent).
        steps, warmup_steps, sparsity_warmup_steps: length of the run, of the learning-rate warm-up, of the target's.
        node_loss: False is the published ``--disable_node_loss``: node masks learn from the KL alone.
    """

    def __init__(
        self,
        hf_model: Any,
        embedding_nodes: bool = True,
        *,
        edge_target: float = 0.97,
        node_target: float = 0.72,
        learning_rate: float = 0.8,
        lambda_learning_rate: float = 0.8,
        steps: int = 3000,
        warmup_steps: int = 200,
        sparsity_warmup_steps: int = 2500,
        node_loss: bool = False,
    ) -> None:
        config = hf_model.config
        self.graph = Graph.from_config(config, "split" if embedding_nodes else "none")
        hf_model.requires_grad_(False)
        self.parts: _GPT2 | _Llama = _GPT2(hf_model) if config.model_type == "gpt2" else _Llama(hf_model)
        self.weight = self.parts.unembed.weight
        self.node_loss, self.edge_target, self.node_target = node_loss, edge_target, node_target
        self.sparsity_warmup_steps, self.global_step = sparsity_warmup_steps, 0

        shapes = self._shapes()
        start = {name: torch.randn(shape) * 0.01 + 10 for name, shape in shapes.items()}
        self.log_alphas = {name: nn.Parameter(value.to(self.weight)) for name, value in start.items()}
        self.full_log_alphas = {name: torch.full_like(p, 40.0) for name, p in self.log_alphas.items()}  # masks of 1
        self.valid = {name: self._valid(name) for name in shapes if not name.startswith("write")}
        self.lambdas = {
            f"{kind}_{power}": nn.Parameter(self.weight.new_zeros(())) for kind in ("edge", "node") for power in (1, 2)
        }
        ascent = [p for name, p in self.lambdas.items() if node_loss or name.startswith("edge")]
        self.parameters = [*self.log_alphas.values(), *self.lambdas.values()]
        groups: list[dict[str, Any]] = [{"params": list(self.log_alphas.values())}]
        groups.append({"params": ascent, "lr": lambda_learning_rate, "maximize": True})
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)

        def factor(k: int) -> float:
            return k / warmup_steps if k < warmup_steps else max(0, steps - k) / (steps - warmup_steps)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Log-alpha tensors by name: ``read.q3 [W, H]``, ``read.m3 [W]``, ``write.a3 [H]``, ``write.m3 [1]``, ..."""
        graph, rows = self.graph, self.graph.num_writers
        shapes: dict[str, tuple[int, ...]] = {f"write.e{i}": (1,) for i in range(graph.num_embedding_writers)}
        for layer in range(graph.num_layers):
            heads = {"q": graph.num_heads, "k": graph.num_kv_heads, "v": graph.num_kv_heads}
            shapes |= {f"read.{kind}{layer}": (rows, count) for kind, count in heads.items()}
            shapes |= {f"read.m{layer}": (rows,), f"write.a{layer}": (graph.num_heads,), f"write.m{layer}": (1,)}
        return shapes | {"read.final": (rows,)}

    def _site_rows(self, name: str) -> tuple[Any, slice]:
        """The graph's site that the reads of ``name`` belong to, and their rows in that site."""
        graph, kind = self.graph, name.removeprefix("read.")
        if kind == "final":
            return graph.final_site, slice(0, 1)
        layer, heads, kv = int(kind[1:]), graph.num_heads, graph.num_kv_heads
        if kind[0] == "m":
            return graph.mlp_site(layer), slice(0, 1)
        first = {"q": 0, "k": heads, "v": heads + kv}[kind[0]]
        return graph.attention_site(layer), slice(first, first + (heads if kind[0] == "q" else kv))

    def _valid(self, name: str) -> Tensor:
        """1 for the writers that the reads of ``name`` can see, 0 for later ones: ``[W, 1]`` or ``[W]``."""
        row = torch.arange(self.graph.num_writers, device=self.weight.device) < self._site_rows(name)[0].num_writers
        return row.to(self.weight.dtype).view((-1, 1) if len(self.log_alphas[name].shape) == 2 else (-1,))

    def masks_from(self, edge: Tensor, node: Tensor) -> Masks:
        """Per-tensor masks from values per edge ``[num_edges]`` (order of ``graph.edges``) and per writer ``[W]``."""
        masks = {name: torch.zeros_like(p) for name, p in self.log_alphas.items()}
        for name in self.valid:
            site, rows = self._site_rows(name)
            masks[name][: site.num_writers] = site.view(edge)[rows].T.reshape(masks[name][: site.num_writers].shape)
        for i in range(self.graph.num_embedding_writers):
            masks[f"write.e{i}"][:] = node[i]
        for layer in range(self.graph.num_layers):
            first, mlp = self.graph.head_writer(layer), self.graph.mlp_writer(layer)
            masks[f"write.a{layer}"][:], masks[f"write.m{layer}"][:] = node[first:mlp], node[mlp]
        return masks

    def _read(self, stream: Tensor, corrupted: Tensor | None, kept: Tensor | None, name: str, mask: Tensor) -> Tensor:
        """sum_j z_j y_j + sum_j (1 - z_j) y~_j over all W rows: ``[h, B, S, d]``; ``[B, S, d]`` if mask is a vector."""
        mixing = "wbsd,wh->hbsd" if mask.ndim == 2 else "wbsd,w->bsd"
        x = torch.einsum(mixing, stream, mask * self.valid[name])
        if kept is not None:
            x = x + kept
        if corrupted is not None:
            x = x + torch.einsum(mixing, corrupted, (1 - mask) * self.valid[name])
        return x

    def _write(self, stream: Tensor, out: Tensor, first: int, corrupted: Tensor | None, mask: Tensor) -> Tensor:
        """A new stream with ``z out + (1 - z) y~`` ``[h, B, S, d]`` in rows first, first + 1, ..."""
        out = out * mask.view(-1, 1, 1, 1)
        if corrupted is not None:
            out = out + corrupted[first : first + len(out)] * (1 - mask.view(-1, 1, 1, 1))
        place = torch.eye(len(stream), dtype=out.dtype, device=out.device)[first : first + len(out)]
        return stream + torch.einsum("hbsd,hw->wbsd", out, place)

    def forward(self, ids: Tensor, masks: Masks, corrupted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[B, S, V]`` and stream ``[W, B, S, d]`` under ``masks``; ``corrupted`` None is zero ablation."""
        parts, graph = self.parts, self.graph
        embeddings = parts.embeddings(ids, split=graph.num_embedding_writers == 2)
        stream = embeddings[0].new_zeros(graph.num_writers, *embeddings[0].shape)
        kept = None if graph.num_embedding_writers else embeddings[0]
        for i in range(graph.num_embedding_writers):
            stream = self._write(stream, embeddings[i][None], i, corrupted, masks[f"write.e{i}"])
        for layer in range(graph.num_layers):
            names = (f"read.q{layer}", f"read.k{layer}", f"read.v{layer}")
            heads = parts.attention(layer, *(self._read(stream, corrupted, kept, n, masks[n]) for n in names))
            stream = self._write(stream, heads, graph.head_writer(layer), corrupted, masks[f"write.a{layer}"])
            x = self._read(stream, corrupted, kept, f"read.m{layer}", masks[f"read.m{layer}"])
            out = parts.mlp(layer, x)[None]
            stream = self._write(stream, out, graph.mlp_writer(layer), corrupted, masks[f"write.m{layer}"])
        x = self._read(stream, corrupted, kept, "read.final", masks["read.final"])
        return parts.unembed(parts.final_norm(x)), stream

    @torch.no_grad()
    def full_model(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and stream of the unmasked model, in the same disentangled form."""
        return self.forward(ids, {name: expected_mask(value) for name, value in self.full_log_alphas.items()})

    def penalty(self, masks: Masks) -> Tensor:
        """lambda_1 (s - t) + lambda_2 (s - t)^2 for edges and nodes, s = 1 - mean(mask), t the current target."""
        edges = sum(torch.sum(masks[name] * valid) for name, valid in self.valid.items()) / self.graph.num_edges
        nodes = sum(torch.sum(z) for name, z in masks.items() if name.startswith("write")) / self.graph.num_writers
        progress = min(1.0, self.global_step / max(self.sparsity_warmup_steps, 1))
        loss = self.weight.new_zeros(())
        for kind, mean, target in (("edge", edges, self.edge_target), ("node", nodes, self.node_target)):
            gap = 1 - mean - target * progress
            loss = loss + self.lambdas[f"{kind}_1"] * gap + self.lambdas[f"{kind}_2"] * gap**2
        return loss

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """KL(full model || circuit) + penalty, with freshly drawn masks. Arguments as for `training_step`."""
        ids = batch["input_ids"]
        full_logits, _ = self.full_model(ids)
        _, corrupted = self.full_model(batch["corrupted_input_ids"])
        masks = {name: sample_mask(p) for name, p in self.log_alphas.items()}
        logits, _ = self.forward(ids, masks, corrupted)
        kl = logits.new_zeros(())
        for i in range(len(ids)):
            answer = slice(int(batch["start"][i].item()), int(batch["end"][i].item()))
            circuit, full = (F.log_softmax(x[i, answer], -1) for x in (logits, full_logits))
            kl = kl + F.kl_div(circuit, full, reduction="batchmean", log_target=True)
        return kl / len(ids) + self.penalty(masks)

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One optimiser step; returns the loss.

        Args:
            batch: ``input_ids`` and ``corrupted_input_ids`` ``[B, S]``; ``start`` and ``end`` ``[B]``: the positions
                ``start <= p < end`` of an example whose next-token distributions are compared.
        """
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        for p in self.parameters:
            p.grad = None
        self.global_step += 1
        return loss.detach()

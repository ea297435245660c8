"""Quirks of the published Edge Pruning code that change its numbers; used only with ``upstream_compat=True``.

Two act during training (the joint clip norm, frozen embedding writers in Llama), two at the end (impossible edges that
are stored, decay, and take part in the rounding; a writer count that leaves out the position embeddings). For Tracr's
programs the published code has a loss and a threshold of its own.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.settings import Settings
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.evaluation.reference import Batch
from fastcircuit.formats.score_file import best
from fastcircuit.graph import FINAL_READ, Graph
from fastcircuit.masks import Masks, probability_of_zero, soft_value, target_sparsity
from fastcircuit.models.masked import MaskedCausalLM

_TOLERANCE = 1e-5
_TRACR_THRESHOLD = 0.005


def detach_frozen_nodes(model: MaskedCausalLM, masks: Masks) -> Masks:
    """The published Llama code lets no KL gradient reach the embedding writer's own mask."""
    if model.graph.embedding_nodes != "joint" or masks.node is None:
        return masks
    return Masks(masks.edge, torch.cat([masks.node[:1].detach(), masks.node[1:]]))


def divergence(model: MaskedCausalLM, batch: Batch, log_probs: Tensor) -> Tensor:
    """The published KL of a batch, in nats: for Tracr's programs it is summed over positions, not averaged.

    Of a numerical program it compares softmaxes of the numbers *over the positions* of a list.
    """
    answers = batch.answers
    if model.config.model_type != "tracr":
        return answers.example_mean(kl_divergence(answers.log_probs, log_probs), batch.size)
    if model.config.answer_values is None:
        return kl_divergence(answers.log_probs, log_probs).sum() / batch.size
    total = log_probs.new_zeros(())
    counts = torch.bincount(answers.example, minlength=batch.size).tolist()
    numbers = (_numbers(model.config, values).split(counts) for values in (answers.log_probs, log_probs))
    for full, circuit in zip(*numbers, strict=True):
        total = total + kl_divergence(torch.log_softmax(full, 0), torch.log_softmax(circuit, 0))
    return total / batch.size


def _numbers(config: Any, log_probs: Tensor) -> Tensor:
    """The numbers that a program's distributions over its answers stand for (see ``modeling_tracr.py``), ``[N]``."""
    first, last = (log_probs[:, config.answers[index]] for index in (0, -1))
    low, high = config.answer_values[0], config.answer_values[-1]
    return config.noise**2 * (last - first) / (high - low) + (low + high) / 2


def update(parameters: MaskParameters, optimizer: torch.optim.Optimizer) -> None:
    """Step. Without a writer loss that embedding writer has no gradient at all: weight decay passes it by too."""
    frozen = parameters.node[:1].detach().clone()
    optimizer.step()
    if parameters.graph.embedding_nodes == "joint" and parameters.settings.node_target is None:
        with torch.no_grad():
            parameters.node[:1] = frozen


def clip(parameters: MaskParameters, masks: Masks, step: int, norm: float) -> None:
    """Clip the joint norm, which counts the writer multipliers' gradients even when those are not trained.

    Without a node loss GPT-2's published code still differentiates it (its multipliers are 0 and stay 0), so
    ``(s - t)`` (where there is a linear term) and ``(s - t)^2`` of the writers enter the norm.
    """
    gradients = [value.grad for value in parameters.parameters() if value.grad is not None]
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    settings = parameters.settings
    if settings.node_target is None and settings.silent_node_target is not None:
        assert masks.node is not None
        warmup = settings.sparsity_warmup
        target = target_sparsity(step, warmup, settings.silent_node_target, settings.schedule)
        gap = 1 - masks.node.detach().mean() - target
        total = total + gap.pow(4) + (gap.square() if settings.linear_term else 0)
    scale = torch.clamp(norm / (total.sqrt() + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def published_circuit(parameters: MaskParameters, num_edges: int | None, architecture: str) -> Circuit:
    """The circuit the published code ends with: thresholds of edges and writers chosen separately, by bisection.

    Args:
        architecture: for ``tracr`` both thresholds are the published constant.
        num_edges: shift the edge threshold so that this many edges are kept, writers counted in; None: the natural one.
    """
    graph = parameters.graph
    edge, node = _soft_edges(parameters), _soft_nodes(parameters)
    fixed = architecture == "tracr"
    node_on = node > (_TRACR_THRESHOLD if fixed else _bisect(node, _counted_nodes(graph)))
    writers = graph.edge_writers
    if num_edges is None:
        threshold = _TRACR_THRESHOLD if fixed else _bisect(edge, np.ones(graph.num_edges, dtype=bool))
        keep = (edge > threshold) & node_on[writers]
    else:
        keep = best(np.where(node_on[writers], edge, -1.0), num_edges)
    return Circuit(graph, keep, ablation=parameters.settings.ablation)


def _bisect(soft: np.ndarray, counted: np.ndarray) -> float:
    """The threshold whose hard mask is as sparse as the soft one, to the published tolerance."""
    wanted = 1 - soft[counted].mean()
    low, high, threshold = 0.0, 1.0, 0.5
    while high - low > _TOLERANCE:
        threshold = (low + high) / 2
        if 1 - (soft[counted] > threshold).mean() > wanted:
            high = threshold
        else:
            low = threshold
    return threshold


def _counted_nodes(graph: Graph) -> np.ndarray:
    """Writers the published writer sparsity counts: all but the position embeddings."""
    return np.array([name != "pos_embeds" for name in graph.writers])


def _soft_edges(parameters: MaskParameters) -> np.ndarray:
    """Deterministic masks of all edges, cut per parameter tensor, impossible edges included in the cut."""
    soft = np.empty(parameters.graph.num_edges)
    decayed = decayed_log_alpha(parameters.settings)
    values = parameters.edge.detach().cpu()
    for flat, impossible in parameter_tensors(parameters.graph):
        padded = torch.cat([values[flat], torch.full((impossible,), decayed, dtype=values.dtype)])
        soft[flat] = _cut(padded)[: len(flat)].numpy()
    return soft


def _soft_nodes(parameters: MaskParameters) -> np.ndarray:
    """Deterministic masks of all writers: a tensor per layer's heads, one per MLP and per embedding."""
    graph, values = parameters.graph, parameters.node.detach().cpu()
    soft = np.empty(graph.num_writers)
    groups = [slice(index, index + 1) for index in range(graph.num_embedding_writers)]
    for layer in range(graph.num_layers):
        mlp = graph.mlp_writer(layer)
        groups += [slice(graph.head_writer(layer), mlp), slice(mlp, mlp + 1)]
    for group in groups:
        soft[group] = _cut(values[group]).numpy()
    return soft


def _cut(log_alpha: Tensor) -> Tensor:
    """Soft values with the ``round(E[#zeros])`` smallest set to 0."""
    soft = soft_value(log_alpha)
    zeros = int(torch.round(probability_of_zero(log_alpha).clamp(1e-6, 1 - 1e-6).sum()))
    if zeros:
        soft[torch.topk(soft, k=zeros, largest=False).indices] = 0
    return soft


def parameter_tensors(graph: Graph) -> Iterator[tuple[np.ndarray, int]]:
    """Edges of every published parameter tensor (q, k, v, an MLP, the final read), and how many impossible ones."""
    splits = (graph.num_heads, graph.num_kv_heads, graph.num_kv_heads)
    for site in graph.sites:
        edges = np.arange(site.first_edge, site.first_edge + site.num_edges).reshape(site.num_readers, site.num_writers)
        for block in np.split(edges, np.cumsum(splits)[:-1]) if site.name.startswith("a") else [edges]:
            impossible = 0 if site.name == FINAL_READ else len(block) * (graph.num_writers - site.num_writers)
            yield block.ravel(), impossible


def decayed_log_alpha(settings: Settings) -> float:
    """Where weight decay alone has brought the log-alpha of an edge that cannot exist."""
    value = settings.initial_log_alpha
    for step in range(settings.steps):
        value *= 1 - settings.learning_rate * settings.rate_factor(step) * settings.weight_decay
    return value

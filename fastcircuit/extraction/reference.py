"""Algorithm 1 as written, one full forward pass per candidate: slow, obvious, the specification of greedy.py."""

import numpy as np
import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.extraction.ablation import check_finite
from fastcircuit.extraction.path import OnCandidate, Path, without
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import attend, output_projection
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.tasks.task import Examples


@torch.no_grad()
def prune_paths(
    model: MaskedCausalLM,
    constants: Constants,
    validation: Examples,
    paths: list[Path],
    order: list[int],
    on_candidate: OnCandidate | None = None,
) -> None:
    """Run every path of Algorithm 1 to its end (the paper's pseudocode; arguments as in ``greedy.prune_paths``)."""
    original = pruned_log_probs(model, constants, everything(model), validation)
    check_finite(model, original)
    components = [(layer, component) for layer in reversed(range(model.graph.num_layers)) for component in order]
    decided = 0
    for path in paths:
        for layer, component in components:
            if not path.done:
                pruned = pruned_log_probs(model, constants, without(path.kept, layer, component), validation)
                path.decide(layer, component, _mean_kl(original, pruned, validation))
            decided += 1
            if on_candidate is not None:
                on_candidate(decided, len(paths) * len(components))


def everything(model: MaskedCausalLM) -> Kept:
    """The whole model."""
    graph = model.graph
    return Kept(np.ones((graph.num_layers, graph.num_heads), dtype=bool), np.ones(graph.num_layers, dtype=bool))


@torch.no_grad()
def pruned_log_probs(model: MaskedCausalLM, constants: Constants, kept: Kept, examples: Examples) -> Tensor:
    """The pruned model's log-probabilities at the answers, row by row, ``[N, V]``, in float32 or better.

    Raises:
        InputError: a prompt is longer than constants that are per position.
    """
    packing = Packing(examples.input_ids.shape, examples.attention_mask, model.device)
    stream = pruned_stream(model, constants, kept, packing.pack(examples.input_ids.to(model.device)), packing)
    logits = model.unembed(stream.index_select(0, packing.select(examples.answer_mask)))
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def pruned_stream(
    model: MaskedCausalLM, constants: Constants, kept: Kept, token_ids: Tensor, packing: Packing
) -> Tensor:
    """The final stream ``[T, d]`` of the whole model with the removed components' outputs replaced."""
    anatomy, positions = model.anatomy, packing.position_ids
    if 1 < constants.mlps.shape[1] < packing.longest:
        raise InputError(
            f"a prompt has {packing.longest} tokens; mean-positional constants end at {constants.mlps.shape[1]}"
        )
    rotary = None if anatomy.rotary is None else anatomy.rotary(positions)
    stream = torch.stack(anatomy.embed(token_ids, positions)).sum(0)
    where = positions if constants.mlps.shape[1] > 1 else torch.zeros_like(positions)
    for layer, block in enumerate(anatomy.blocks):
        attention, heads = block.attention, torch.from_numpy(kept.heads[layer]).to(stream.device)
        x = attention.norm(stream)[None]
        out = attend(attention, tuple(part(x) for part in attention.projections), rotary, packing, anatomy.causal)
        constant = constants.heads[layer].transpose(0, 1)[where]
        out = torch.where(heads[:, None], out.unflatten(1, (len(heads), -1)), constant).flatten(1)
        stream = stream + out @ output_projection(attention)
        if attention.out_bias is not None:
            stream = stream + attention.out_bias * (1 if constants.has_output_bias else heads.double().mean().item())
        if kept.mlps[layer]:
            stream = stream + block.mlp(block.mlp_norm(stream))
        else:
            stream = stream + constants.mlps[layer][where]
    return stream


def _mean_kl(original: Tensor, pruned: Tensor, examples: Examples) -> float:
    """Mean over each example's answers, then over examples."""
    counts = examples.answer_mask.sum(1)
    weights = (1 / counts.double() / len(counts)).repeat_interleave(counts).to(original.device)
    return float(kl_divergence(original, pruned).double() @ weights)

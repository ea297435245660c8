"""Circuits to compile, and what the masked model says their logits are."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fastcircuit import zoo
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.states import States
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants, Kept
from tests.models.tiny import tiny_model

ZOO = ("stories260K", "induction-gpt2")
ABLATIONS = ("zero-split", "zero-kept", "mean", "mean-positional")
LENGTH = 11


def load(name, dtype=torch.float64):
    """A zoo model or a tiny random one, wrapped."""
    if name in ZOO:
        return MaskedCausalLM(AutoModelForCausalLM.from_pretrained(zoo.resolve(name), dtype=dtype))
    return MaskedCausalLM(tiny_model(name, dtype))


def token_ids(model, batch=3, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


def random_kept(model, seed=0, share=0.5):
    generator = np.random.default_rng(seed)
    layers, heads = model.graph.num_layers, model.graph.num_heads
    return Kept(generator.random((layers, heads)) < share, generator.random(layers) < share)


def constants_of(model, ablation):
    """The constants of an ablation; the means are of the model's own activations."""
    states, _, _ = model.run(token_ids(model, batch=7, seed=1))
    heads = model.graph.num_heads
    of_heads = states.heads.unflatten(1, (7, LENGTH)).unflatten(-1, (heads, -1))  # [L, B, S, H, d_head]
    of_mlps = states.mlps.unflatten(1, (7, LENGTH))  # [L, B, S, d]
    if ablation == "mean-positional":
        return Constants(of_heads.mean(1).transpose(1, 2), of_mlps.mean(1))
    pooled = Constants(of_heads.mean((1, 2))[:, :, None], of_mlps.mean((1, 2))[:, None])
    if ablation == "mean":
        return pooled
    return Constants(
        torch.zeros_like(pooled.heads), torch.zeros_like(pooled.mlps), has_output_bias=ablation == "zero-kept"
    )


def ablated_logits(model, kept, constants, ids, attention_mask=None):
    """The truth: the original model with node masks 0 at removed components, which carry their constants."""
    graph = model.graph
    _, _, packing = model.run(ids, attention_mask)
    node = torch.ones(graph.num_writers)
    for layer in range(graph.num_layers):
        first = graph.head_writer(layer)
        node[first : first + graph.num_heads] = torch.from_numpy(kept.heads[layer]).float()
        node[graph.mlp_writer(layer)] = float(kept.mlps[layer])
    heads, mlps = constants.heads.transpose(1, 2).flatten(2), constants.mlps
    if mlps.shape[1] > 1:
        heads, mlps = heads[:, packing.position_ids], mlps[:, packing.position_ids]
    embeds = torch.zeros(len(graph.writers) - node[graph.num_embedding_writers :].numel(), 1, mlps.shape[-1])
    ablated = States(embeds.to(mlps), heads, mlps, constants.has_output_bias)
    masks = Masks(edge=torch.ones(graph.num_edges), node=node)
    return model(ids, attention_mask, masks=masks, ablated=ablated).logits


def assert_same(actual, expected, rounding=1e-12):
    """Equal to ``rounding`` of the largest value: float64 leaves no more than that."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rounding * expected.abs().max()


def partial(model, ablation="mean", **options):
    """A circuit with uneven layers: its first layer has no head, its last one no MLP, and what else is random."""
    kept = random_kept(model, seed=3)
    kept.heads[0], kept.mlps[0], kept.mlps[-1] = False, True, False
    kept.heads[-1] = np.arange(model.graph.num_heads) < max(1, model.graph.num_heads - 1)
    constants = constants_of(model, ablation)
    return kept, constants, compile_submodel(model, kept, constants, **options)


def headless(model, ablation="mean", **options):
    """A circuit without any attention."""
    kept = random_kept(model, seed=3)
    kept.heads[:] = False
    kept.mlps[0] = True
    constants = constants_of(model, ablation)
    return kept, constants, compile_submodel(model, kept, constants, **options)


CIRCUITS = {"partial": partial, "headless": headless}

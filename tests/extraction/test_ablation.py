"""What removed components write, against a slow oracle, and what they do to the model, against masked edges."""

import numpy as np
import pytest
import torch

from fastcircuit import InputError, MaskedCausalLM, Masks
from fastcircuit.extraction import ablation, reference
from fastcircuit.extraction.ablation import ablation_constants
from fastcircuit.models.states import States
from fastcircuit.submodel.kept import Kept
from tests.extraction.random_models import random_task
from tests.models.oracle import writer_outputs
from tests.models.tiny import TINY, tiny_model

LENGTH = 7


def prompts(length=None, size=5):
    return random_task({"train": size}, length, longest=LENGTH).split("train")


def written_by(model, constants, layer, head):
    """What a removed head adds to the stream, ``[P, d]``."""
    attention = model.anatomy.blocks[layer].attention
    bias = 0 if attention.out_bias is None else attention.out_bias / model.graph.num_heads
    return constants.heads[layer, head] @ attention.out_weight[head] + bias


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["mean", "mean-positional"])
def test_means_are_those_of_the_oracle(name, kind, monkeypatch):
    monkeypatch.setattr(ablation, "CHUNK_BYTES", 10_000)  # a few prompts a chunk
    model = MaskedCausalLM(tiny_model(name))
    examples = prompts(length=LENGTH if kind == "mean-positional" else None)
    constants = ablation_constants(model, examples, kind)
    outputs = [
        writer_outputs(model.model, model.graph, ids[real])
        for ids, real in zip(examples.input_ids, examples.attention_mask, strict=True)
    ]
    for layer in range(model.graph.num_layers):
        for head in range(model.graph.num_heads + 1):
            is_mlp = head == model.graph.num_heads
            rows = [output[f"m{layer}" if is_mlp else f"a{layer}.h{head}"] for output in outputs]
            expected = torch.cat(rows).mean(0, keepdim=True) if kind == "mean" else torch.stack(rows).mean(0)
            found = constants.mlps[layer] if is_mlp else written_by(model, constants, layer, head)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["mean", "mean-positional", "zero-split", "zero-kept"])
def test_pruning_is_masking_nodes(name, kind):
    model = MaskedCausalLM(tiny_model(name))
    examples = prompts(length=LENGTH if kind == "mean-positional" else None)
    kind, _, output_bias = kind.partition("-") if kind.startswith("zero") else (kind, "", "split")
    constants = ablation_constants(model, examples, kind, output_bias)
    kept, masks = random_circuit(model)
    found = reference.pruned_log_probs(model, constants, kept, examples)
    logits = model(
        examples.input_ids,
        examples.attention_mask,
        masks=masks,
        positions=examples.answer_mask,
        ablated=states(model, constants, examples),
    ).logits
    torch.testing.assert_close(found, torch.log_softmax(logits, -1), rtol=1e-9, atol=1e-9)


def test_zero_is_the_masked_models_zero():
    model = MaskedCausalLM(tiny_model("gpt2"))
    examples = prompts()
    run = model.run(examples.input_ids, examples.attention_mask)[0]
    for output_bias in ("split", "kept"):
        constants = ablation_constants(model, examples, "zero", output_bias)
        assert constants.has_output_bias == run.zero(output_bias).has_output_bias
        assert not constants.heads.any()
        assert not constants.mlps.any()


def random_circuit(model):
    graph = model.graph
    generator = np.random.default_rng(0)
    kept = Kept(generator.random((graph.num_layers, graph.num_heads)) < 0.5, generator.random(graph.num_layers) < 0.5)
    node = torch.ones(graph.num_writers, dtype=torch.float64)
    for layer in range(graph.num_layers):
        row = torch.from_numpy(kept.heads[layer]).double()
        node[graph.head_writer(layer) : graph.mlp_writer(layer)] = row
        node[graph.mlp_writer(layer)] = float(kept.mlps[layer])
    return kept, Masks(torch.ones(graph.num_edges, dtype=torch.float64), node)


def states(model, constants, examples):
    """The constants as the ablated run of a masked model."""
    heads, mlps = constants.heads.transpose(1, 2).flatten(2), constants.mlps
    if heads.shape[1] > 1:
        heads, mlps = (part.repeat(1, len(examples), 1) for part in (heads, mlps))
    embeds = torch.zeros(len(model.anatomy.embed(torch.tensor([0]), torch.tensor([0]))), 1, mlps.shape[2])
    return States(embeds.double(), heads, mlps, constants.has_output_bias)


def test_positions_need_equal_lengths():
    model = MaskedCausalLM(tiny_model("llama"))
    with pytest.raises(InputError, match=r"equal length; these have \d to \d tokens: use mean"):
        ablation_constants(model, prompts(), "mean-positional")


def test_positions_refuse_longer_prompts():
    model = MaskedCausalLM(tiny_model("llama"))
    constants = ablation_constants(model, prompts(length=3), "mean-positional")
    with pytest.raises(InputError, match="4 tokens; mean-positional constants end at 3"):
        reference.pruned_log_probs(model, constants, random_circuit(model)[0], prompts(length=4))


def test_unknown_names_are_refused():
    model = MaskedCausalLM(tiny_model("llama"))
    with pytest.raises(InputError, match="accepted: mean, mean-positional, zero"):
        ablation_constants(model, prompts(), "median")
    with pytest.raises(InputError, match="accepted: split, kept"):
        ablation_constants(model, prompts(), "zero", "half")

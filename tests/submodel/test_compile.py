"""A compiled submodel computes what the ablated original computes, and so does it after every pass."""

import dataclasses

import numpy as np
import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.submodel import passes
from fastcircuit.submodel.assembly import assemble
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Kept
from fastcircuit.submodel.lowering import SOURCES, lower
from fastcircuit.submodel.parts import AttentionPart, ConstantPart
from tests.models.tiny import TINY
from tests.submodel.circuits import (
    ABLATIONS,
    LENGTH,
    ZOO,
    ablated_logits,
    assert_same,
    constants_of,
    load,
    partial,
    random_kept,
    token_ids,
)

LOWERED = [name for name, (_, config) in TINY.items() if config.model_type in SOURCES]


@pytest.fixture(params=[*LOWERED, *ZOO])
def model(request):
    return load(request.param)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_logits_are_the_ablated_models(model, ablation):
    constants, ids = constants_of(model, ablation), token_ids(model)
    for seed, share in enumerate([0.0, 0.2, 0.5, 0.5, 0.8, 1.0]):
        kept = random_kept(model, seed, share)
        submodel = compile_submodel(model, kept, constants)
        assert_same(submodel(ids).logits, ablated_logits(model, kept, constants, ids))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_of_padded_prompts_are_the_ablated_models(name):
    model = load(name)
    kept, constants, submodel = partial(model, "mean-positional")
    ids = token_ids(model)
    real = torch.ones_like(ids)
    real[0, :4] = 0
    real[1, -3:] = 0
    expected = ablated_logits(model, kept, constants, ids, real)
    assert_same(submodel(ids, attention_mask=real).logits[real.bool()], expected[real.bool()])


def test_everything_kept_is_the_hugging_face_model(model):
    ids = token_ids(model)
    submodel = compile_submodel(model, random_kept(model, share=1.0), constants_of(model, "mean-positional"))
    # Hugging Face computes RMSNorm in float32, whatever the model's dtype.
    assert_same(submodel(ids).logits, model.model(ids).logits, rounding=1e-5)
    assert submodel.config.constant_positions is None


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_every_pass_changes_nothing_but_the_size(model, ablation, seed):
    ids = token_ids(model)
    kept = random_kept(model, seed, share=0.4)
    program = lower(model.model, kept, constants_of(model, ablation))
    expected = assemble(program)(ids).logits
    for step in (passes.merge_constants, passes.drop_empty_blocks, passes.fold_norms):
        assert_same(assemble(step(program))(ids).logits, expected)
    for step in (passes.drop_empty_blocks, passes.merge_constants, passes.fold_norms):
        program = step(program)
        assert_same(assemble(program)(ids).logits, expected)
    answers = [7, 3, 5]
    assert_same(assemble(passes.restrict_to_answers(program, answers))(ids).logits, expected[..., answers])


def test_every_block_has_one_attention(model):
    for seed in range(8):
        program = lower(model.model, random_kept(model, seed, share=0.3), constants_of(model, "mean"))
        blocks = passes.drop_empty_blocks(program).blocks
        counts = [sum(isinstance(part, AttentionPart) for part in block) for block in blocks]
        assert counts == [1] * len(blocks) or counts == [0]


def test_single_vectors_leave_no_constant_behind_a_writer(model):
    program = lower(model.model, random_kept(model, 1, share=0.4), constants_of(model, "mean"))
    merged = passes.merge_constants(passes.drop_empty_blocks(program))
    left = [index for index, part in enumerate(merged.parts) if isinstance(part, ConstantPart)]
    # Rotary models have no table to put a constant in that comes before every writer.
    assert left in ([], [0])
    assert not left or merged.positions is None


def test_folded_norms_have_no_weights(model):
    _, _, folded = partial(model)
    _, _, plain = partial(model, fold_norms=False)
    names = [name for name, _ in folded.named_parameters() if "norm" in name]
    assert names == ([] if not folded.config.tie_word_embeddings else [n for n in names if n.startswith("model.norm")])
    assert any("parts.0.norm" in name for name, _ in plain.named_parameters())


def test_embeddings_stay_tied_until_the_head_changes():
    model = load("gpt2")
    _, _, tied = partial(model)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    _, _, answers = partial(model, answer_tokens=[4, 2])
    assert answers.lm_head.weight.shape == (2, model.config.hidden_size)
    _, _, untied = partial(load("llama"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_submodel_shares_nothing_with_the_original(model):
    _, _, submodel = partial(model)
    own = {parameter.data_ptr() for parameter in submodel.parameters()}
    assert not own & {parameter.data_ptr() for parameter in model.model.parameters()}


def test_mean_positional_refuses_longer_inputs(model):
    _, _, submodel = partial(model, "mean-positional")
    submodel(token_ids(model))
    with pytest.raises(ValueError, match=f"has {LENGTH + 1} tokens; this circuit takes at most {LENGTH}"):
        submodel(token_ids(model, length=LENGTH + 1))


def test_config_says_what_is_kept(model):
    kept, _, submodel = partial(model)
    assert submodel.config.source["mlps"] == np.flatnonzero(kept.mlps).tolist()
    assert submodel.config.source["heads"] == [np.flatnonzero(row).tolist() for row in kept.heads]
    assert submodel.generation_config.eos_token_id == model.model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one"),
        ([3, 3], "each token id once"),
        ([3, 41], "answer token 41 is outside the model's vocabulary of 41"),
        ([-1], "answer token -1"),
    ],
)
def test_bad_answer_tokens(tokens, message):
    with pytest.raises(InputError, match=message):
        partial(load("gpt2"), answer_tokens=tokens)


def test_bad_shapes_and_values():
    model = load("llama")
    kept, constants = random_kept(model), constants_of(model, "mean")
    with pytest.raises(InputError, match=r"kept.heads has shape \[2, 4\]; this model needs \[3, 4\]"):
        compile_submodel(model, Kept(kept.heads[:2], kept.mlps), constants)
    with pytest.raises(InputError, match=r"kept.mlps has dtype int64; it must be bool"):
        compile_submodel(model, Kept(kept.heads, kept.mlps.astype(int)), constants)
    with pytest.raises(InputError, match=r"constants.heads has shape"):
        compile_submodel(model, kept, dataclasses.replace(constants, heads=constants.heads[..., :2]))
    with pytest.raises(InputError, match=r"constants.mlps has shape \[3, 2, 24\]; this model needs \[3, 1, 24\]"):
        compile_submodel(model, kept, dataclasses.replace(constants, mlps=constants.mlps.expand(-1, 2, -1)))
    with pytest.raises(InputError, match=r"constants.mlps holds NaN"):
        compile_submodel(model, kept, dataclasses.replace(constants, mlps=constants.mlps * torch.nan))


def test_unsupported_architecture_names_the_supported_ones():
    model = load("gpt2")
    _, constants, submodel = partial(model)
    with pytest.raises(InputError, match="architecture 'fastcircuit'; supported: gpt2, llama, mistral, qwen2"):
        compile_submodel(submodel, random_kept(model), constants)

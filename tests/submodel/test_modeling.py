"""The submodel as Hugging Face uses it: caches, beams, padding, attention functions, compilation, export, dtypes."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants
from fastcircuit.submodel.modeling_circuit import CACHE, CircuitMLP
from tests.submodel.circuits import CIRCUITS, LENGTH, ZOO, ablated_logits, assert_same, load, token_ids

TINY_ONES = ("gpt2", "llama-biases-head-dim", "mistral-window", "qwen2-mixed-window")
NEW = 9
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
PROMPT = 5


@pytest.fixture(scope="module", params=[(name, kind) for name in (*ZOO, *TINY_ONES) for kind in CIRCUITS], ids="-".join)
def circuit(request):
    """An original, what is kept, the constants, the submodel."""
    name, kind = request.param
    model = load(name)
    return model, *CIRCUITS[kind](model)


@pytest.fixture(scope="module")
def submodel(circuit):
    return circuit[-1]


def prompts(submodel, batch=3, length=PROMPT):
    return token_ids(submodel, batch, length)


def full_mask(ids):
    return torch.ones_like(ids)


def test_greedy_tokens_are_the_ablated_models(circuit):
    model, kept, constants, submodel = circuit
    ids = prompts(submodel)
    made = submodel.generate(ids, attention_mask=full_mask(ids), **{**GREEDY, "min_new_tokens": None})
    expected = ids
    for _ in range(made.shape[1] - PROMPT):
        logits = ablated_logits(model, kept, constants, expected)[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    eos = submodel.generation_config.eos_token_id
    stops = torch.zeros_like(expected, dtype=torch.bool) if eos is None else expected == eos
    ended = stops[:, PROMPT:-1].cumsum(1).bool()  # after the end of a row generate writes padding
    assert torch.equal(made[:, PROMPT : PROMPT + 1], expected[:, PROMPT : PROMPT + 1])
    assert torch.equal(made[:, PROMPT + 1 :][~ended], expected[:, PROMPT + 1 :][~ended])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_same_with_every_cache(submodel, beams):
    ids = prompts(submodel)
    runs = [
        submodel.generate(ids, attention_mask=full_mask(ids), num_beams=beams, **GREEDY, **cache)
        for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
    ]
    assert runs[0].shape[1] == PROMPT + NEW
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize(
    ("pieces", "name"), [((4, 1, 1, 5), "cache"), ((1, 10), "past_key_values"), ((11,), "past_key_values")]
)
def test_logits_with_a_cache_are_those_without(submodel, make_cache, pieces, name):
    ids = token_ids(submodel)
    cache = DynamicCache(config=submodel.config)
    if make_cache is StaticCache:
        cache = StaticCache(config=submodel.config, max_cache_len=LENGTH + 2)
    logits, seen = [], 0
    for piece in pieces:
        logits.append(submodel(ids[:, seen : seen + piece], use_cache=True, **{name: cache}).logits)
        seen += piece
        assert int(cache.get_seq_length()) == seen
    assert_same(torch.cat(logits, dim=1), submodel(ids, use_cache=False).logits)


def test_every_layer_of_the_cache_is_used(submodel):
    cache = getattr(submodel(token_ids(submodel), use_cache=True), CACHE)
    assert len(cache.layers) == submodel.config.num_hidden_layers == len(submodel.model.layers)
    assert all(layer.get_seq_length() == LENGTH for layer in cache.layers)


def test_left_padding_changes_nothing(submodel):
    short, long = token_ids(submodel, 1, 4), token_ids(submodel, 1, 7, seed=5)
    ids = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    real = torch.ones_like(ids)
    real[0, :3] = 0
    padded = submodel(ids, attention_mask=real).logits
    assert_same(padded[:1, 3:], submodel(short).logits)
    assert_same(padded[1:], submodel(long).logits)
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        made = submodel.generate(ids, attention_mask=real, **GREEDY, **cache)
        for row, prompt in ((0, short), (1, long)):
            alone = submodel.generate(prompt, attention_mask=full_mask(prompt), **GREEDY)
            assert torch.equal(made[row, 7:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("keep", [1, 3, LENGTH, LENGTH + 4, torch.tensor([0, 4, 9])], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_kept_logits_are_those_of_all_positions(submodel, keep, attention, padded):
    ids = token_ids(submodel)
    real = full_mask(ids)
    if padded:
        real[1, :2] = 0
    places = keep if isinstance(keep, torch.Tensor) else torch.arange(LENGTH)[-keep:]
    real_ones = real[:, places].bool()  # what is computed at padding is nobody's business
    expected = submodel(ids, attention_mask=real).logits[:, places][real_ones]
    submodel.set_attn_implementation(attention)
    try:
        assert_same(submodel(ids, attention_mask=real, logits_to_keep=keep).logits[real_ones], expected)
        cache = StaticCache(config=submodel.config, max_cache_len=LENGTH + 5)
        kept = submodel(ids, attention_mask=real, past_key_values=cache, logits_to_keep=keep).logits
        assert_same(kept[real_ones], expected)
        with_layers = submodel(ids, attention_mask=real, logits_to_keep=keep, output_hidden_states=True)
        assert_same(with_layers.logits[real_ones], expected)
        assert all(stream.shape[1] == LENGTH for stream in with_layers.hidden_states)
    finally:
        submodel.set_attn_implementation("sdpa")


def test_sdpa_is_eager(submodel):
    ids = token_ids(submodel)
    expected = submodel(ids).logits
    submodel.set_attn_implementation("eager")
    try:
        outputs = submodel(ids, output_attentions=True)
    finally:
        submodel.set_attn_implementation("sdpa")
    assert_same(outputs.logits, expected)
    for weights in outputs.attentions or ():
        assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_loss_is_the_cross_entropy_of_the_next_token(submodel):
    ids = token_ids(submodel)
    outputs = submodel(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss.float(), expected)


def test_embeddings_may_be_given_instead_of_tokens(submodel):
    ids = token_ids(submodel)
    assert_same(submodel(inputs_embeds=submodel.get_input_embeddings()(ids)).logits, submodel(ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        submodel()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", CIRCUITS)
def test_bfloat16_is_as_exact_as_the_original(name, kind):
    exact = load(name)
    kept, constants, _ = CIRCUITS[kind](exact)
    ids = token_ids(exact)
    truth = ablated_logits(exact, kept, constants, ids)
    rough = load(name, torch.bfloat16)
    rounded = Constants(constants.heads.bfloat16(), constants.mlps.bfloat16(), constants.has_output_bias)
    allowed = (ablated_logits(rough, kept, rounded, ids).double() - truth).abs().max()
    submodel = compile_submodel(rough, kept, constants)
    assert submodel.dtype == torch.bfloat16
    error = (submodel(ids).logits.double() - truth).abs().max()
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", CIRCUITS)
def test_compiles_to_one_graph(name, kind):
    model = load(name)
    _, _, submodel = CIRCUITS[kind](model)
    ids = token_ids(submodel)
    torch._dynamo.reset()
    compiled = torch.compile(submodel, fullgraph=True)
    # Hugging Face has rotary angles in float32, whatever the dtype, and a compiled cosine rounds differently.
    rounding = 4 * torch.finfo(torch.float32).eps if submodel.model.rotary_emb is not None else 1e-12
    assert_same(compiled(ids, use_cache=False).logits, submodel(ids).logits, rounding)
    assert_same(compiled(ids, use_cache=False, logits_to_keep=1).logits, submodel(ids).logits[:, -1:], rounding)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", CIRCUITS)
def test_exports_with_any_batch_and_length(name, kind):
    _, _, submodel = CIRCUITS[kind](load(name))
    shape = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=30)}
    exported = torch.export.export(
        submodel, (token_ids(submodel),), {"use_cache": False}, dynamic_shapes={"input_ids": shape, "use_cache": None}
    )
    for batch, length in ((3, LENGTH), (5, 7)):
        ids = token_ids(submodel, batch, length, seed=2)
        assert_same(exported.module()(ids, use_cache=False).logits, submodel(ids).logits)


@pytest.mark.parametrize("name", ZOO)
def test_last_position_only(name):
    model = load(name)
    kept, constants, _ = CIRCUITS["partial"](model)
    kept.mlps[:] = True  # there is one above the last attention
    everywhere = compile_submodel(model, kept, constants)
    submodel = compile_submodel(model, kept, constants, last_position_only=True)
    ids = token_ids(submodel)
    widths = []
    for module in submodel.modules():
        if isinstance(module, CircuitMLP):
            module.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    assert_same(submodel(ids).logits, everywhere(ids).logits[:, -1:])
    last = [part["kind"] for part in submodel.config.blocks[-1]]
    above = last[last.index("attention") :].count("mlp")
    assert above >= 1
    assert widths == [LENGTH] * (len(widths) - above) + [1] * above
    assert_same(submodel(ids, logits_to_keep=0).logits, everywhere(ids).logits)
    assert submodel(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", CIRCUITS)
def test_answers_only(name, kind):
    model = load(name)
    answers = [9, 4, 17]
    _, _, whole = CIRCUITS[kind](model)
    _, _, submodel = CIRCUITS[kind](model, answer_tokens=answers, last_position_only=True)
    ids = token_ids(submodel)
    assert submodel.config.answer_tokens == answers
    assert_same(submodel(ids).logits, whole(ids).logits[:, -1:, answers])
    with pytest.raises(ValueError, match="cannot generate text"):
        submodel.generate(ids)
    with pytest.raises(ValueError, match="no loss over labels"):
        submodel(ids, labels=ids)

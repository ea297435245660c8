"""Tokens that cannot differ from the ablated run are left out: same logits, same gradients, and nothing read there."""

import dataclasses

import pytest
import torch

from fastcircuit.evaluation.faithfulness import mean_kl
from fastcircuit.evaluation.reference import LEAST_SHARED, Reference
from fastcircuit.graph import EMBEDDING_NODES
from fastcircuit.masks import Masks
from fastcircuit.models.changing import Changing
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.models.trunk import Trunk
from fastcircuit.tasks.task import Examples, Pair
from tests.models.test_masked import random_masks
from tests.models.tiny import TINY, tiny_model

CAUSAL = [name for name in TINY if name != "tracr"]
SHARED, LENGTHS = (4, 1, 7), (6, 3, 8)  # tokens in common, tokens, of three prompts


def examples(shared=SHARED, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number, (same, length) in enumerate(zip(shared, lengths, strict=True)):
        clean = torch.randint(1, 41, (length,), generator=generator)
        corrupted = clean.clone()
        corrupted[same] = (clean[same] + 1) % 41
        pairs.append(Pair(clean.tolist(), corrupted.tolist(), (length - 1,), (3,), (5,), f"pair {number}"))
    return Examples.from_pairs(pairs)


def batch_of(model, **kwargs):
    return Reference(model, examples(**kwargs)).batch(torch.arange(3))


def read(model, batch, masks, **options):
    return model.final_read(batch.token_ids, batch.packing, batch.ablated, masks, batch.answers.tokens, **options)


@pytest.mark.parametrize("embedding_nodes", EMBEDDING_NODES)
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("recompute", [True, False])
def test_the_read_and_its_gradients_are_the_same(name, embedding_nodes, recompute):
    model = MaskedCausalLM(tiny_model(name), embedding_nodes, recompute=recompute)
    batch, masks = batch_of(model), random_masks(model.graph)
    assert batch.changing is not None
    assert batch.changing.tokens.tolist() == [4, 5, 7, 8, 16]
    reads = [read(model, batch, masks, skip_zeros=True, changing=changing) for changing in (batch.changing, None)]
    torch.testing.assert_close(*reads, rtol=1e-11, atol=1e-12)
    weights = torch.randn(reads[0].shape, dtype=reads[0].dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((each * weights).sum(), (masks.edge, masks.node)) for each in reads]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_trunk_of_it_is_a_trunk_as_any(name):
    model = MaskedCausalLM(tiny_model(name))
    batch = batch_of(model)
    masks = Masks((random_masks(model.graph).edge > 0.5).double())
    trunk = Trunk()
    with torch.no_grad():
        whole = read(model, batch, masks, skip_zeros=True, changing=batch.changing, trunk=trunk)
        from_layer = read(model, batch, masks, skip_zeros=True, changing=batch.changing, trunk=trunk.up_to(1))
    torch.testing.assert_close(from_layer, whole, rtol=0, atol=0)


def test_the_stream_has_no_other_tokens(monkeypatch):
    model = MaskedCausalLM(tiny_model("llama"))
    seen = []

    def spy(stream, *args, **kwargs):
        seen.append(stream.shape[1])
        return plain(stream, *args, **kwargs)

    from fastcircuit.models import stream as module

    plain = module.masked_read
    monkeypatch.setattr(module, "masked_read", spy)
    batch = batch_of(model)
    read(model, batch, random_masks(model.graph), changing=batch.changing)
    assert set(seen) == {5, 3}  # those that change; the answers


def test_which_tokens_can_change():
    model = MaskedCausalLM(tiny_model("gpt2"))
    data = examples()
    changed_late = dataclasses.replace(data, answer_mask=data.answer_mask.clone())
    changed_late.answer_mask[0, 1] = True  # an answer before the first difference is looked at too
    batch = Reference(model, changed_late).batch(torch.tensor([0, 2]))
    assert batch.changing is not None
    assert batch.changing.tokens.tolist() == [1, 2, 3, 4, 5, 13]
    assert batch.changing.others.tolist() == [0, 6, 7, 8, 9, 10, 11, 12]


def test_not_where_it_cannot_be_or_does_not_pay():
    causal, both_ways = (MaskedCausalLM(tiny_model(name)) for name in ("gpt2", "tracr"))
    assert Reference(both_ways, examples()).batch(torch.arange(3)).changing is None
    for ablation in ("mean", "zero"):
        assert Reference(causal, examples(), ablation).batch(torch.arange(3)).changing is None
    assert LEAST_SHARED > 1 / 6
    assert batch_of(causal, shared=(1, 1, 1), lengths=(6, 6, 6)).changing is None


def test_a_run_on_the_whole_batch_has_the_same_loss():
    model = MaskedCausalLM(tiny_model("llama"))
    reference, masks = Reference(model, examples()), random_masks(model.graph)
    found = mean_kl(reference, masks)
    reference.shared.zero_()
    assert reference.batch(torch.arange(3)).changing is None
    assert found == pytest.approx(mean_kl(reference, masks), rel=1e-10)


def test_padding_on_the_left_is_no_beginning():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    packing = Packing(mask.shape, mask, torch.device("cpu"))
    changing = Changing.of(packing.position_ids >= 1)
    assert changing.tokens.tolist() == [1, 3, 4]
    assert changing.places(torch.tensor([4, 1])).tolist() == [2, 0]

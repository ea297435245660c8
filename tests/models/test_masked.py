"""Masked models against Hugging Face (masks 1), the corrupted run (masks 0) and the oracle (random masks)."""

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.graph import EMBEDDING_NODES
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from tests.models.oracle import oracle_logits, writer_outputs
from tests.models.tiny import TINY, tiny_model

# Hugging Face computes RMSNorm statistics and rotary tables in float32, whatever the model's dtype.
HF_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_masks(graph, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    edge = torch.rand(graph.num_edges, generator=generator, dtype=dtype) * 1.4 - 0.2
    node = torch.rand(graph.num_writers, generator=generator, dtype=dtype) * 1.4 - 0.2
    return Masks(edge.clamp(0, 1).requires_grad_(), node.clamp(0, 1).requires_grad_())


def constant_masks(graph, value, dtype=torch.float64):
    return Masks(torch.full((graph.num_edges,), value, dtype=dtype), torch.ones(graph.num_writers, dtype=dtype))


def pair(seed=0, batch=2, length=6, vocabulary=41):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (2, batch, length), generator=generator)


@pytest.mark.parametrize("name", TINY)
def test_masks_one_is_the_hugging_face_model(name):
    hf_model = tiny_model(name)
    model = MaskedCausalLM(hf_model)
    clean, corrupted = pair()
    masked = model(clean, corrupted_input_ids=corrupted, masks=constant_masks(model.graph, 1.0)).logits
    expected = hf_model(clean).logits
    torch.testing.assert_close(masked, expected, **HF_TOLERANCE)
    torch.testing.assert_close(model(clean).logits, expected, **HF_TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_masks_zero_is_the_corrupted_run(name):
    model = MaskedCausalLM(tiny_model(name))
    clean, corrupted = pair()
    masked = model(clean, corrupted_input_ids=corrupted, masks=constant_masks(model.graph, 0.0)).logits
    torch.testing.assert_close(masked, model(corrupted).logits)


@pytest.mark.parametrize("embedding_nodes", EMBEDDING_NODES)
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("recompute", [True, False])
def test_random_masks_equal_the_oracle_gradients_included(name, embedding_nodes, recompute):
    hf_model = tiny_model(name)
    model = MaskedCausalLM(hf_model, embedding_nodes, recompute=recompute)
    clean, corrupted = pair()
    masks = random_masks(model.graph)
    logits = model(clean, corrupted_input_ids=corrupted, masks=masks).logits
    expected = torch.stack(
        [
            oracle_logits(hf_model, model.graph, masks.edge, masks.node, *rows)
            for rows in zip(clean, corrupted, strict=True)
        ]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((logits * weights).sum(), (masks.edge, masks.node))
    theirs = torch.autograd.grad((expected * weights).sum(), (masks.edge, masks.node))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("output_bias", ["split", "kept"])
@pytest.mark.parametrize("name", ["gpt2", "llama-biases-head-dim", "tracr"])
def test_zero_ablation_follows_the_bias_convention(name, output_bias):
    hf_model = tiny_model(name)
    model = MaskedCausalLM(hf_model)
    clean, _ = pair()
    masks = random_masks(model.graph)
    states, _, _ = model.run(clean)
    logits = model(clean, masks=masks, ablated=states.zero(output_bias)).logits
    for row, ids in enumerate(clean):
        expected = oracle_logits(hf_model, model.graph, masks.edge, masks.node, ids, "zero", output_bias)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "llama-biases-head-dim", "tracr"])
def test_mean_ablation_carries_the_mean_of_every_writer(name):
    hf_model = tiny_model(name)
    model = MaskedCausalLM(hf_model)
    clean, patching = pair()
    masks = random_masks(model.graph)
    states, _, _ = model.run(patching)
    logits = model(clean, masks=masks, ablated=states.mean()).logits
    written = [writer_outputs(hf_model, model.graph, ids) for ids in patching]
    means = {writer: torch.cat([w[writer] for w in written]).mean(0, keepdim=True) for writer in written[0]}
    for row, ids in enumerate(clean):
        expected = oracle_logits(hf_model, model.graph, masks.edge, masks.node, ids, means)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-window", "tracr", "tracr-causal"])
def test_padding_changes_nothing(name, side):
    model = MaskedCausalLM(tiny_model(name))
    masks = random_masks(model.graph)
    lengths, longest = (6, 3, 1), 7
    prompts = [pair(seed=length, batch=1, length=length) for length in lengths]
    padded = torch.full((2, len(lengths), longest), 40)
    attention_mask = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        places = slice(longest - length, None) if side == "left" else slice(0, length)
        padded[:, row, places] = prompt[:, 0]
        attention_mask[row, places] = 1
    logits = model(padded[0], attention_mask, padded[1], masks).logits
    unmasked = model(padded[0], attention_mask).logits
    for row, (clean, corrupted) in enumerate(prompts):
        alone = model(clean, corrupted_input_ids=corrupted, masks=masks).logits[0]
        torch.testing.assert_close(logits[row][attention_mask[row].bool()], alone)
        torch.testing.assert_close(unmasked[row][attention_mask[row].bool()], model(clean).logits[0])
    assert not logits[~attention_mask.bool()].any()


def test_left_padding_equals_hugging_face_with_position_ids():
    hf_model = tiny_model("gpt2")
    clean, _ = pair(length=6)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    expected = hf_model(clean, attention_mask=attention_mask, position_ids=position_ids).logits
    real = attention_mask.bool()
    torch.testing.assert_close(MaskedCausalLM(hf_model)(clean, attention_mask).logits[real], expected[real])


def test_positions_select_logits():
    model = MaskedCausalLM(tiny_model("llama"))
    clean, corrupted = pair(batch=3)
    masks = random_masks(model.graph)
    everywhere = model(clean, corrupted_input_ids=corrupted, masks=masks).logits

    def at(positions):
        return model(clean, corrupted_input_ids=corrupted, masks=masks, positions=positions).logits

    rows = torch.arange(3)
    torch.testing.assert_close(at(torch.tensor([1, 5, 0]))[:, 0], everywhere[rows, [1, 5, 0]])
    torch.testing.assert_close(at(torch.tensor([-1, -1, -1]))[:, 0], everywhere[:, -1])
    repeated = torch.tensor([[1, 1], [3, 2], [5, 0]])
    torch.testing.assert_close(at(repeated), everywhere[rows[:, None], repeated])
    spans = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(at(spans), everywhere[spans])


def test_masks_none_of_node_means_ones():
    model = MaskedCausalLM(tiny_model("gpt2"))
    clean, corrupted = pair()
    edge = random_masks(model.graph).edge
    ones = torch.ones(model.graph.num_writers, dtype=torch.float64)
    with_ones = model(clean, corrupted_input_ids=corrupted, masks=Masks(edge, ones)).logits
    torch.testing.assert_close(model(clean, corrupted_input_ids=corrupted, masks=Masks(edge)).logits, with_ones)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-window", "qwen2-mixed-window"])
def test_bfloat16_is_as_near_float64_as_plain_torch(name):
    """Logits and the gradient by every mask: at most twice the error of the oracle in bfloat16."""
    hf_model = tiny_model(name, torch.bfloat16)
    exact_model = tiny_model(name, torch.bfloat16).double()  # the same weights
    narrow, exact = MaskedCausalLM(hf_model), MaskedCausalLM(exact_model)
    clean, corrupted = pair()
    masks = random_masks(exact.graph)
    weights = torch.randn(2, 6, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def results(logits):
        return logits.detach().double(), *torch.autograd.grad((logits * weights).sum(), (masks.edge, masks.node))

    def run(model):
        return model(clean, corrupted_input_ids=corrupted, masks=masks).logits

    rows = [
        oracle_logits(hf_model, narrow.graph, masks.edge, masks.node, *prompts)
        for prompts in zip(clean, corrupted, strict=True)
    ]
    logits = run(narrow)
    assert logits.dtype == torch.bfloat16
    for truth, ours, plain in zip(*map(results, (run(exact), logits, torch.stack(rows))), strict=True):
        error, plain_error = ((found - truth).norm() / truth.norm() for found in (ours, plain))
        assert 0 < error <= 2 * plain_error
        assert plain_error < 0.2


def test_weights_are_shared_not_copied():
    hf_model = tiny_model("llama", torch.float32)
    model = MaskedCausalLM(hf_model)
    clean, corrupted = pair()
    before = model(clean, corrupted_input_ids=corrupted, masks=constant_masks(model.graph, 1.0)).logits
    with torch.no_grad():
        hf_model.model.layers[0].self_attn.o_proj.weight.mul_(2)
    after = model(clean, corrupted_input_ids=corrupted, masks=constant_masks(model.graph, 1.0)).logits
    assert not torch.allclose(before, after)
    own = {parameter.data_ptr() for parameter in hf_model.parameters()}
    block = model.anatomy.blocks[0]
    assert block.attention.out_weight.data_ptr() in own
    assert block.attention.query.weight.data_ptr() in own


@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("name", "nodes"), [("gpt2", "split"), ("llama-biases-head-dim", "none"), ("llama", "joint"), ("tracr", "split")]
)
def test_skipping_zeros_changes_nothing(name, nodes, recompute, density):
    model = MaskedCausalLM(tiny_model(name), nodes, recompute=recompute)
    clean, corrupted = pair()
    generator = torch.Generator().manual_seed(3)
    on = torch.rand(model.graph.num_edges, generator=generator) < density
    edge = (random_masks(model.graph).edge.detach() * on).requires_grad_()
    states, _, packing = model.run(corrupted)
    tokens = torch.tensor([3, 5, 11])
    reads = [
        model.final_read(clean.flatten(), packing, ablated, Masks(edge), tokens, skip_zeros)
        for ablated in (states, states.mean(), states.zero("split"), states.zero("kept"))
        for skip_zeros in (False, True)
    ]
    for whole, skipped in zip(reads[::2], reads[1::2], strict=True):
        torch.testing.assert_close(skipped, whole, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(read.square().sum(), edge)[0] for read in (whole, skipped)]
        torch.testing.assert_close(gradients[1][edge != 0], gradients[0][edge != 0], rtol=1e-9, atol=1e-9)


def test_a_second_backward_says_why_it_cannot():
    model = MaskedCausalLM(tiny_model("gpt2"))
    clean, corrupted = pair()
    masks = random_masks(model.graph)
    loss = model(clean, corrupted_input_ids=corrupted, masks=masks).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        loss.backward()


def test_recompute_and_keeping_give_the_same_gradients():
    results = []
    for recompute in (True, False):
        model = MaskedCausalLM(tiny_model("gpt2", torch.float32), recompute=recompute)
        clean, corrupted = pair()
        masks = random_masks(model.graph)
        logits = model(clean, corrupted_input_ids=corrupted, masks=masks).logits
        results.append(torch.autograd.grad(logits.square().sum(), (masks.edge, masks.node)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


BAD_CALLS = {
    "no corrupted": ({"corrupted_input_ids": None}, "corrupted_input_ids"),
    "misaligned": ({"corrupted_input_ids": torch.zeros(2, 5, dtype=torch.int64)}, "aligned token by token"),
    "token": ({"input_ids": torch.full((2, 6), 41)}, "outside the model's vocabulary of 41"),
    "too long": (
        {
            "input_ids": torch.zeros(2, 17, dtype=torch.int64),
            "corrupted_input_ids": torch.zeros(2, 17, dtype=torch.int64),
        },
        "at most 16",
    ),
    "mask shape": ({"attention_mask": torch.ones(2, 5)}, "attention_mask has shape"),
    "mask hole": ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]] * 2)}, "hole"),
    "empty row": ({"attention_mask": torch.tensor([[0] * 6, [1] * 6])}, "row 0 of attention_mask"),
    "positions range": ({"positions": torch.tensor([6, 0])}, r"\[-6, 5\]"),
    "positions shape": ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions has shape"),
    "edge masks": ({"masks": Masks(torch.ones(7))}, "masks.edge has shape"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(case):
    model = MaskedCausalLM(tiny_model("gpt2"))
    clean, corrupted = pair()
    changes, message = BAD_CALLS[case]
    call = {"input_ids": clean, "corrupted_input_ids": corrupted, "masks": constant_masks(model.graph, 1.0)} | changes
    with pytest.raises(InputError, match=message):
        model(**call)


class Wrapped(torch.nn.Module):
    """A model within another that shares its config, as PEFT's are."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


@pytest.mark.parametrize("name", ["gpt2", "llama", "tracr"])
def test_what_is_no_causal_language_model_is_refused(name):
    model = tiny_model(name)
    kind, body = type(model).__name__, type(model.base_model).__name__
    with pytest.raises(InputError, match=r"a Wrapped cannot be masked; .*\(gpt2, llama, .*merge_and_unload") as refusal:
        MaskedCausalLM(Wrapped(model))
    assert "\n" not in str(refusal.value)
    if name != "tracr":  # its body is no model of its own
        with pytest.raises(InputError, match=rf"a {body} cannot be masked; accepted: {kind},"):
            MaskedCausalLM(model.base_model)
    with pytest.raises(InputError, match="a Linear cannot be masked"):
        MaskedCausalLM(torch.nn.Linear(2, 2))


def test_positions_on_padding_are_refused():
    model = MaskedCausalLM(tiny_model("gpt2"))
    clean, _ = pair()
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with pytest.raises(InputError, match="names padding"):
        model(clean, attention_mask, positions=torch.tensor([-1, -1]))


def test_recomputing_in_backward_writes_no_row_again(monkeypatch):
    from fastcircuit.models.stream import MaskedRun

    calls = []
    for name in ("_write_heads", "_ablated_heads"):
        whole = getattr(MaskedRun, name)
        monkeypatch.setattr(
            MaskedRun, name, lambda *args, name=name, whole=whole: (calls.append(name), whole(*args))[1]
        )
    model = MaskedCausalLM(tiny_model("llama"), recompute=True)
    clean, corrupted = pair()
    masks = random_masks(model.graph)
    model(clean, corrupted_input_ids=corrupted, masks=masks).logits.sum().backward()
    assert sorted(calls) == sorted(["_write_heads", "_ablated_heads"] * model.graph.num_layers)

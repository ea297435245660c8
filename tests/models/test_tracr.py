"""Compiled programs: converted, saved and loaded, they compute what the program says, position by position."""

from fractions import Fraction
from itertools import product

import pytest
import torch

from fastcircuit import zoo
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models import packing
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.modeling_tracr import TracrLMHeadModel
from fastcircuit.models.tracr_compiled import from_assembled, tokenizer_of
from tests.models.compiled import FRACTIONS, assembled, stand_in_for_haiku
from tests.models.test_masked import random_masks
from tests.models.tiny import tiny_model

PROGRAMS = {"reverse": None, "xproportion": FRACTIONS}


@pytest.fixture
def compile_program(monkeypatch):
    stand_in_for_haiku(monkeypatch)
    return lambda name, **changes: from_assembled(assembled(name), PROGRAMS[name], **changes)


def answers(model, tokenizer, words):
    ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"]
    return tokenizer.convert_ids_to_tokens(model(ids).logits[0].argmax(-1).tolist())


@pytest.mark.parametrize("length", range(1, 6))
def test_reverse_reverses(length):
    model, tokenizer = MaskedCausalLM.from_pretrained("tracr-reverse"), load_tokenizer("tracr-reverse")
    for words in product("123", repeat=length):
        assert answers(model, tokenizer, words)[1:] == list(reversed(words))


@pytest.mark.parametrize("length", range(5))
def test_xproportion_counts(length):
    model, tokenizer = MaskedCausalLM.from_pretrained("tracr-xproportion"), load_tokenizer("tracr-xproportion")
    for words in product("abcx", repeat=length):
        expected = [str(Fraction(words[:n].count("x"), n)) for n in range(1, length + 1)]
        assert answers(model, tokenizer, words) == ["0", *expected]


def test_a_number_is_read_with_a_gaussian_error():
    model, tokenizer = load_model("tracr-xproportion"), load_tokenizer("tracr-xproportion")
    config = model.config
    log_probs = model(tokenizer("x a c", return_tensors="pt")["input_ids"]).logits[0, 3].log_softmax(-1)
    values = torch.tensor(config.answer_values)
    expected = (-((values - 1 / 3) ** 2) / (2 * config.noise**2)).log_softmax(-1)
    torch.testing.assert_close(log_probs[torch.tensor(config.answers)], expected)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_shipped_model_is_the_published_one(name, compile_program):
    shipped = TracrLMHeadModel.from_pretrained(zoo.resolve(f"tracr-{name}"))
    converted = compile_program(name)
    assert shipped.config.tokens == converted.config.tokens
    for key, value in converted.state_dict().items():
        assert torch.equal(value, shipped.state_dict()[key]), key


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_converted_model_loads_from_its_directory(name, compile_program, tmp_path):
    model = compile_program(name)
    model.save_pretrained(tmp_path)
    tokenizer_of(model.config).save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    ids = tokenizer("1 2 2" if name == "reverse" else "a x c", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == model.config.bos_token_id
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.graph == Graph(model.config.num_hidden_layers, 1, 1, "split")


REFUSED = {
    "layer norm": (lambda model: setattr(model.model_config, "layer_norm", True), "with layer_norm is not supported"),
    "activation": (lambda model: setattr(model.model_config, "activation_function", lambda x: x), "is not ReLU"),
    "twins": (lambda model: model.input_encoder.encoding_map.update({1: 5}), "token '1' .* twice"),
    "space": (lambda model: model.input_encoder.encoding_map.update({"a b": 5}), "has a space"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused(case, monkeypatch):
    stand_in_for_haiku(monkeypatch)
    compiled = assembled("reverse")
    change, message = REFUSED[case]
    change(compiled)
    with pytest.raises(InputError, match=message):
        from_assembled(compiled)


@pytest.mark.parametrize(("numbers", "message"), [(None, "say which ones"), ([1.0], "at least two different")])
def test_a_numerical_program_needs_its_numbers(numbers, message, monkeypatch):
    stand_in_for_haiku(monkeypatch)
    with pytest.raises(InputError, match=message):
        from_assembled(assembled("xproportion"), numbers)


def test_a_program_compiled_here_is_converted():
    """With the real tracr package, where it is installed; its stand-in is what the tests above convert."""
    compiling = pytest.importorskip("tracr.compiler.compiling", reason="the tracr package is not installed")
    from tracr.compiler import lib
    from tracr.rasp import rasp

    compiled = compiling.compile_rasp_to_model(lib.make_reverse(rasp.tokens), {1, 2, 3}, max_seq_len=5)
    model = from_assembled(compiled)
    assert answers(model, tokenizer_of(model.config), "1332")[1:] == list("2331")


@pytest.mark.parametrize("name", ["tracr", "tracr-causal"])
def test_long_prompts_take_torchs_attention_to_the_same_result(name, monkeypatch):
    """The packed kernel is for short sequences; padding is on the right, then on the left."""
    model = MaskedCausalLM(tiny_model(name))
    masks = random_masks(model.graph)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(41, (2, 3, 7), generator=generator)
    for lengths in ([7, 4, 1], [-7, -4, -1]):
        attention_mask = torch.zeros(3, 7, dtype=torch.int64)
        for row, length in enumerate(lengths):
            attention_mask[row, : length if length > 0 else None][length if length < 0 else None :] = 1
        results = []
        for short in (packing.SHORT, 0):
            monkeypatch.setattr(packing, "SHORT", short)
            logits = model(clean, attention_mask, corrupted, masks).logits
            results.append((logits, torch.autograd.grad(logits.square().sum(), masks.edge)[0]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            model(clean, attention_mask).logits[attention_mask.bool()],
            model.model(clean, attention_mask).logits[attention_mask.bool()],
        )


def test_the_masked_program_with_nothing_removed_is_the_program():
    model, tokenizer = load_model("tracr-reverse"), load_tokenizer("tracr-reverse")
    ids = tokenizer(["1 2 3", "3 3 1"], return_tensors="pt")["input_ids"]
    masks = Masks(torch.ones(model.graph.num_edges))
    for ablated in (None, model.run(ids)[0].mean(), model.run(ids)[0].zero("split"), model.run(ids)[0].zero("kept")):
        logits = model(ids, corrupted_input_ids=ids.flip(0), masks=masks, ablated=ablated).logits
        torch.testing.assert_close(logits, model.model(ids).logits)

"""How much faster a submodel is: which rows there are, on which inputs, and what counts as work."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastcircuit.errors import InputError, RunError
from fastcircuit.submodel import speed
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants
from tests.submodel.circuits import LENGTH, load, partial

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module", params=["gpt2", "mistral-window"])
def models(request):
    """An original and a submodel of it."""
    original = load(request.param, torch.float32)
    return original.model.eval(), partial(original)[-1].eval()


def phases_of(rows):
    return [(row.phase, row.batch, row.tokens) for row in rows]


def test_rows(models):
    rows = speed.measure_speed(*models, tokens=16, batches=(1, 2), rounds=3)
    assert phases_of(rows) == [("prefill", 1, 16), ("decode", 1, 16), ("prefill", 2, 16), ("decode", 2, 16)]
    for row in rows:
        assert row.bound >= 1
        assert row.speedup == pytest.approx(row.original_ms / row.submodel_ms)
        assert row.original_ms <= row.original_p95_ms
        assert row.submodel_ms <= row.submodel_p95_ms


def test_prompts_are_no_longer_than_the_original_takes(models):
    original, submodel = models
    known = original.config.max_position_embeddings
    assert phases_of(speed.measure_speed(original, submodel, tokens=64, batches=(1,), rounds=2)) == [
        ("prefill", 1, known),
        ("decode", 1, known),
    ]


@pytest.mark.parametrize(("positions", "phases"), [(LENGTH, ["prefill", "decode"]), (speed.DECODED, ["prefill"])])
def test_prompts_are_no_longer_than_the_submodel_takes(positions, phases):
    original = load("llama", torch.float32)
    kept, constants, _ = partial(original, "mean-positional")
    few = Constants(constants.heads[:, :, :positions], constants.mlps[:, :positions])
    submodel = compile_submodel(original, kept, few).eval()
    rows = speed.measure_speed(original.model.eval(), submodel, tokens=16, batches=(3,), rounds=2)
    assert phases_of(rows) == [(phase, 3, positions) for phase in phases]


def test_compiled_rows_are_of_compiled_models():
    original = load("gpt2", torch.float32)
    models = original.model.eval(), partial(original)[-1].eval()
    counters = torch._dynamo.utils.counters
    counters.clear()
    done = []
    with torch.compiler.set_stance(force_backend="eager"):
        rows = speed.measure_speed(
            *models, tokens=16, batches=(1, 2), rounds=2, compiled=True, on_row=lambda *at: done.append(at)
        )
    phases = ("prefill", "decode", "prefill, compiled", "decode, compiled")
    assert phases_of(rows) == [(phase, batch, 16) for batch in (1, 2) for phase in phases]
    assert done == [(row + 1, 8) for row in range(8)]
    probe, calls = 1, 2 * 2 * 2  # batches, models, phases
    assert counters["stats"]["unique_graphs"] == probe + calls
    assert rows[0].bound == rows[2].bound


def test_a_machine_that_cannot_compile_is_told_before_anything_is_timed(models, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RunError, match=r"^torch.compile does not work here: no working C.. compiler; time the models"):
        speed.measure_speed(*models, compiled=True, on_row=pytest.fail)


def test_answers_only_has_no_decoding():
    original = load("gpt2", torch.float32)
    submodel = partial(original, answer_tokens=[4, 9])[-1].eval()
    rows = speed.measure_speed(original.model.eval(), submodel, tokens=16, batches=(1,), rounds=2)
    assert phases_of(rows) == [("prefill", 1, 16)]


def logits_of(model, call):
    """All logits that ``model`` gives during ``call``."""
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    with torch.no_grad():
        call()
    handle.remove()
    return torch.cat(seen)


def test_decoding_is_timed_per_token(monkeypatch):
    monkeypatch.setattr(speed, "_interleaved", lambda calls, rounds: [[8e-3, 8e-3], [4e-3, 4e-3]])
    linear = torch.nn.Linear(2, 2)
    ready = [lambda: lambda: linear(torch.ones(1, 2))] * 2
    for phase, expected in (("prefill", 8.0), ("decode", 1.0), ("decode, compiled", 1.0)):
        assert speed._row(phase, torch.zeros(1, 9), ready, 2).original_ms == pytest.approx(expected)


def test_decoding_starts_from_the_same_cache_every_time(models):
    """Also where a sliding window has dropped what came before."""
    ids = torch.arange(3, 3 + 12)[None]
    for model in models:
        ready = speed._decode(model, ids)
        first, second = (logits_of(model, ready()) for _ in range(2))
        assert first.shape[0] == speed.DECODED
        assert torch.equal(first, second)
        with torch.no_grad():
            whole = model(ids).logits[0, -speed.DECODED :]
        torch.testing.assert_close(first[:, 0], whole)


def test_a_speed_up_above_its_bound_is_an_error(models, monkeypatch):
    rows = speed.measure_speed(*models, tokens=8, batches=(1,), rounds=2)
    monkeypatch.setattr(speed, "NOISE", 1e9)
    speed.check_bounds(rows)
    monkeypatch.setattr(speed, "NOISE", -1.0)
    with pytest.raises(RunError, match="is above its bound"):
        speed.check_bounds(rows)


def test_models_of_different_vocabularies_are_refused(models):
    with pytest.raises(InputError, match="vocabularies of 50 and 41 tokens"):
        speed.measure_speed(LlamaForCausalLM(LlamaConfig(vocab_size=50, **SMALL)), models[1], rounds=2)


def test_work_counts_products_exactly():
    linear = torch.nn.Linear(7, 5, bias=False)
    x = torch.randn(3, 7)
    with torch.no_grad():
        work = speed.work_of(lambda: lambda: linear(x))
    assert work == speed.Work(flops=2 * 3 * 7 * 5, bytes=4 * (3 * 7 + 7 * 5 + 3 * 5), operations=2)  # one is a view

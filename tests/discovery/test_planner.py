"""The predicted memory of a step is what a step holds; the plan is the cheapest that fits."""

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastcircuit.discovery import Settings, discover, planner
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.live_bytes import LiveBytes
from fastcircuit.discovery.planner import largest_bucket, meta_twin, plan, step_bytes
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.loading import load_model
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Pair
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")


def test_live_bytes_are_those_of_tensors_that_live():
    before = torch.zeros(1000)
    with LiveBytes() as counted:
        first = before + 1  # 4000
        second = torch.cat([first, first])  # 8000
        view = second[3:]
        del first, second
        assert counted.live == 8000
        before.add_(1)
        del view
        third = torch.ones(10, dtype=torch.float64)
        assert counted.live == 80
    assert counted.peak == 12000
    del third
    assert counted.live == 0


def gpt2_of_full_width():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=12, n_embd=768, vocab_size=600, n_positions=64)
    return MaskedCausalLM(GPT2LMHeadModel(config))


MODELS = {
    # what: the model, the lengths of prompts, how many tokens of each are in both of a pair
    "gpt2 of full width": (gpt2_of_full_width, [40, 40], 0),
    "stories260K": (lambda: load_model("stories260K"), [32, 25, 30, 28, 32, 20, 9, 31], 0),
    "prompts that begin alike": (gpt2_of_full_width, [40, 40], 28),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_prediction_is_within_a_tenth_of_what_the_allocator_saw(name, recompute, monkeypatch):
    monkeypatch.setattr("fastcircuit.ops.recycling.LEAST_BYTES", 2**60)  # so that all memory is the allocator's
    build, lengths, shared = MODELS[name]
    model, rows = build(), len(lengths)
    examples = random_examples(lengths, model.config.vocab_size, shared)
    settings = Settings(steps=9, batch_size=rows)
    run = EdgePruning(Reference(model, examples), 100, settings, execution=Execution("dynamic", recompute=recompute))
    run.step()
    generator = run.generator.manual_seed(1)
    measured = peak_of(lambda: run.stepper.compute(1, torch.arange(rows), rows, generator))
    counts = run.reference.counts
    bucket = largest_bucket(run.reference.lengths.sort(descending=True).values, counts, rows, fixed=False)
    changing = sum(lengths) - rows * shared
    predicted = step_bytes(meta_twin(model), bucket, recompute, model.config.vocab_size, settings, CPU, changing)
    assert predicted == pytest.approx(measured, rel=0.1)
    free = {"free": 10**12, "budgets": Budgets(10**6, 0), "execution": Execution("dynamic", rows, recompute)}
    assert plan(model, examples, settings, CPU, **free).step == predicted


def random_examples(lengths, vocabulary, shared=0):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (2, length), generator=generator).tolist() for length in lengths]
    for clean, corrupted in rows:
        corrupted[:shared] = clean[:shared]
        corrupted[shared] = (clean[shared] + 1) % vocabulary
    return Examples.from_pairs([Pair(tuple(a), tuple(b), (len(a) - 1,), (1,), (2,)) for a, b in rows])


def peak_of(call):
    """The most bytes that torch's CPU allocator had handed out during a call, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_plan_is_the_cheapest_that_fits():
    model, examples = MaskedCausalLM(tiny_model("gpt2", torch.float32)), random_examples([16] * 8, 41)
    settings = Settings(batch_size=8)

    def planned(free):
        return plan(model, examples, settings, CPU, budgets=Budgets(10**6, 0), free=free)

    whole = planned(10**12)
    assert (whole.micro_batch, whole.recompute, whole.tokens, whole.fits) == (8, False, 128, True)
    assert whole.weights == 0  # the model is there
    assert whole.total == whole.cache + whole.learned + whole.step
    again = planned(int(whole.total / 0.9) - 1)
    assert (again.micro_batch, again.recompute, again.fits) == (8, True, True)
    assert again.step < 0.9 * whole.step
    part = planned(int(again.total / 0.9) - 1)
    assert part.fits
    assert part.micro_batch in (2, 4)
    nothing = planned(1000)
    assert (nothing.micro_batch, nothing.recompute, nothing.fits) == (1, True, False)


def test_the_shapes_of_a_model_are_enough_and_nothing_of_its_weights():
    model, examples = MaskedCausalLM(tiny_model("llama", torch.float32)), random_examples([9, 7, 5], 41)
    kwargs = {"budgets": Budgets(10**6, 0), "free": 10**12}
    here = plan(model, examples, Settings(batch_size=2), CPU, **kwargs)
    on_meta = plan(meta_twin(model), examples, Settings(batch_size=2), CPU, **kwargs)
    weights = sum(value.numel() * 4 for value in {*model.model.parameters(), *model.model.buffers()})
    assert on_meta.weights == weights
    assert dataclasses.replace(on_meta, weights=0) == here


def test_a_run_that_does_not_fit_is_planned_smaller_and_says_so(monkeypatch):
    model = MaskedCausalLM(tiny_model("llama", torch.float32))
    settings = Settings(steps=3, batch_size=8, refine=False)
    whole = discover(model, make_task(), edges=40, settings=settings)
    monkeypatch.setattr("fastcircuit.discovery.planner.available_host_memory", lambda: 300_000)
    notes = []
    small = discover(model, make_task(), edges=40, settings=settings, on_note=notes.append)
    assert len(notes) == 1
    assert " of 8 examples at a time" in notes[0]
    torch.testing.assert_close(small.masks.edge, whole.masks.edge, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "packed"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_on_a_gpu_half_precision_alone_attends_within_sequences_as_they_lie(dtype, packed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(planner, "missing_reason", lambda backend: None)
    planned = []
    make = planner._Planned

    def noted(bucket, numbers, packed):
        planned.append(packed)
        return make(bucket, numbers, packed)

    monkeypatch.setattr(planner, "_Planned", noted)
    model = meta_twin(MaskedCausalLM(tiny_model("gpt2", torch.float32).to(dtype)))
    bucket = largest_bucket(torch.tensor([9, 5]), torch.tensor([1, 1]), 2, fixed=True)
    assert step_bytes(model, bucket, False, 41, Settings(), torch.device("cuda")) > 0
    assert planned == [packed]

"""Edge Pruning runs: exact sizes, determinism, resuming, failures."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import Settings, discover
from fastcircuit.discovery.discovery import identity_of
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.parameters import warm_density
from fastcircuit.discovery.presets import preset
from fastcircuit.discovery.rounding import top_circuit
from fastcircuit.discovery.run import Run
from fastcircuit.discovery.steppers import DynamicStepper
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.faithfulness import evaluate, mean_kl
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks, probability_of_zero
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks import load_task
from fastcircuit.tasks.task import Examples, Pair, Task
from tests.models.tiny import tiny_model

QUICK = Settings(
    steps=24,
    batch_size=4,
    learning_rate=0.3,
    learning_rate_warmup=2,
    sparsity_warmup=16,
    refine_surplus=4,
    refine_cycles=1,
    refine_swaps=4,
)


def make_task(num=10, vocabulary=41, seed=0):
    rng = np.random.default_rng(seed)

    def row():
        length = int(rng.integers(3, 7))
        clean, corrupted = (tuple(int(t) for t in rng.integers(vocabulary, size=length)) for _ in range(2))
        positions = (length - 2, length - 1)
        return Pair(clean, corrupted, positions, (1, 2), (3, -100))

    splits = {name: Examples.from_pairs([row() for _ in range(num)]) for name in ("train", "test")}
    return Task("tiny", splits, None, "random pairs")


@pytest.mark.parametrize("edges", [1, 7, 50, 180])
@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
def test_the_circuit_has_exactly_the_edges_asked_for(model, edges, ablation):
    found = discover(model, make_task(), edges=edges, settings=dataclasses.replace(QUICK, ablation=ablation))
    assert found.circuit.num_edges == edges
    assert found.circuit.ablation == ablation
    assert found.history.shape == (QUICK.steps, 5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_run_in_bfloat16_ends_at_the_size_with_a_circuit_better_than_chance(name):
    model, task = MaskedCausalLM(tiny_model(name, torch.bfloat16)), make_task()
    found = discover(model, task, edges=40, settings=QUICK)
    assert found.circuit.num_edges == 40
    assert torch.isfinite(found.history).all()
    chance = top_circuit(model.graph, np.random.default_rng(0).normal(size=model.graph.num_edges), 40)
    wide = Reference(MaskedCausalLM(tiny_model(name, torch.bfloat16).double()), task.split("train"))  # the same weights
    kl, chance_kl = (mean_kl(wide, Masks.from_circuit(each)) for each in (found.circuit, chance))
    assert kl < 0.8 * chance_kl


def test_sparsity_is_a_fraction_of_all_edges(model):
    found = discover(model, make_task(), sparsity=0.9, settings=QUICK)
    assert found.circuit.num_edges == round(0.1 * model.graph.num_edges)


def test_both_directions_learn_from_the_exchanged_pairs_too(model):
    task = make_task()
    train = task.split("train")
    exchanged = dataclasses.replace(train, input_ids=train.corrupted_input_ids, corrupted_input_ids=train.input_ids)
    rows = [[examples.select([row]) for examples in (train, exchanged)] for row in range(len(train))]
    by_hand = dataclasses.replace(
        task, splits={**task.splits, "train": Examples.concat([one for pair in rows for one in pair])}
    )
    found = discover(model, task, edges=40, settings=QUICK, both_directions=True)
    assert torch.equal(found.masks.edge, discover(model, by_hand, edges=40, settings=QUICK).masks.edge)
    assert not torch.equal(found.masks.edge, discover(model, task, edges=40, settings=QUICK).masks.edge)
    assert found.circuit.provenance["settings"]["both_directions"] is True


def test_the_same_seed_gives_the_same_run_and_another_seed_another(model):
    task = make_task()
    first, again, other = (discover(model, task, edges=40, settings=QUICK, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.masks.edge, again.masks.edge)
    assert torch.equal(first.history, again.history)
    assert first.circuit == again.circuit
    assert not torch.equal(first.masks.edge, other.masks.edge)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(model, tmp_path):
    task, checkpoint = make_task(), tmp_path / "checkpoint.safetensors"
    whole = discover(model, task, edges=40, settings=QUICK)
    run = EdgePruning(Reference(model, task.split("train")), 40, QUICK, identity_of(model, task))
    for _ in range(11):
        run.step()
    run._flush(None)
    run.save(checkpoint)
    resumed = discover(model, task, edges=40, settings=QUICK, checkpoint=checkpoint, resume=True)
    assert torch.equal(whole.masks.edge, resumed.masks.edge)
    assert torch.equal(whole.history, resumed.history)
    assert whole.circuit == resumed.circuit


def test_an_interrupt_finishes_the_step_and_keeps_a_checkpoint(model, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"

    with pytest.raises(RunError, match=r"interrupted after step 10 of 24; resume from .*checkpoint.safetensors"):
        discover(model, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint, on_report=interrupt_at(9))
    resumed = discover(model, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint, resume=True)
    assert torch.equal(resumed.masks.edge, discover(model, make_task(), edges=40, settings=QUICK).masks.edge)


def interrupt_at(step):
    """An ``on_report`` that presses Ctrl-C at a step."""

    def on_report(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_report


def test_an_interrupt_in_the_last_step_stops_before_refinement(model, tmp_path):
    checkpoint, rounds = tmp_path / "checkpoint.safetensors", []
    kwargs = {"edges": 40, "settings": QUICK, "checkpoint": checkpoint, "on_round": lambda *round: rounds.append(round)}
    with pytest.raises(RunError, match=r"interrupted after step 24 of 24; resume from .*checkpoint.safetensors"):
        discover(model, make_task(), **kwargs, on_report=interrupt_at(23))
    assert not rounds
    resumed = discover(model, make_task(), **kwargs, resume=True)
    assert rounds
    assert resumed.circuit == discover(model, make_task(), edges=40, settings=QUICK).circuit


def test_a_checkpoint_of_another_run_is_refused(model, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    discover(model, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint)
    with pytest.raises(InputError, match="another run: its num_edges is 40"):
        discover(model, make_task(), edges=41, settings=QUICK, checkpoint=checkpoint, resume=True)
    other = MaskedCausalLM(tiny_model("llama", torch.float64))
    with pytest.raises(InputError, match="its dtype is 'float32', this run's is 'float64'"):
        discover(other, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint, resume=True)
    for part in ("input_ids", "corrupted_input_ids", "answers"):
        task = make_task()
        row = getattr(task.split("train"), part)[3]
        row[1] = (row[1] + 1) % 41
        with pytest.raises(InputError, match=r"its training_pairs_hash is '[0-9a-f]{16}', this run's is '"):
            discover(model, task, edges=40, settings=QUICK, checkpoint=checkpoint, resume=True)


def test_overwriting_leaves_nothing_of_the_earlier_run_to_resume_from(model, tmp_path):
    with pytest.raises(RunError, match="interrupted after step 10"):
        Run(tmp_path).discover(model, make_task(), "edge-pruning", QUICK, on_report=interrupt_at(9))
    checkpoint = tmp_path / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    with pytest.raises(InputError, match="sparsity is 2"):
        Run(tmp_path, overwrite=True).discover(model, make_task(), "edge-pruning", QUICK, sparsity=2)
    assert checkpoint.read_bytes() == before  # nothing was started
    broken = dataclasses.replace(QUICK, learning_rate=float("inf"))
    with pytest.raises(RunError, match="nothing was saved"):
        Run(tmp_path, overwrite=True).discover(model, make_task(), "edge-pruning", broken)
    assert not checkpoint.exists()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing"])
def test_a_damaged_checkpoint_is_refused(model, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint.safetensors"
    discover(model, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint)
    if damage == "truncate":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif damage == "garbage":
        checkpoint.write_bytes(b"not a checkpoint at all")
    else:
        checkpoint.unlink()
    with pytest.raises(InputError, match="no checkpoint" if damage == "missing" else "is damaged"):
        discover(model, make_task(), edges=40, settings=QUICK, checkpoint=checkpoint, resume=True)


def test_nan_stops_the_run_with_the_step_and_keeps_the_last_good_checkpoint(model, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run = EdgePruning(Reference(model, make_task().split("train")), 40, QUICK)

    def poison(report):
        if report.step == 19:
            with torch.no_grad():
                run.parameters.edge[3] = float("nan")

    with pytest.raises(RunError, match=r"step 20: (kl|penalty|edge_sparsity) is nan.*last good checkpoint"):
        run.run(checkpoint, checkpoint_every=15, on_report=poison)
    resumed = EdgePruning(Reference(model, make_task().split("train")), 40, QUICK)
    resumed.resume(checkpoint)
    assert resumed.step_number == 15
    assert torch.isfinite(resumed.parameters.edge).all()


def test_out_of_memory_in_the_update_keeps_the_last_good_checkpoint(model, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.safetensors"
    whole = DynamicStepper.update

    def update(self, step):
        if step == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        whole(self, step)

    monkeypatch.setattr(DynamicStepper, "update", update)
    run = EdgePruning(Reference(model, make_task().split("train")), 40, QUICK, execution=Execution("dynamic"))
    with pytest.raises(RunError, match=r"step 20: out of memory in the update; free memory on cpu; the last good"):
        run.run(checkpoint, checkpoint_every=15)
    resumed = EdgePruning(Reference(model, make_task().split("train")), 40, QUICK)
    resumed.resume(checkpoint)
    assert resumed.step_number == 15


def test_a_checkpoint_never_holds_nan(model, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run = EdgePruning(Reference(model, make_task().split("train")), 40, QUICK)
    run.step()
    with torch.no_grad():
        run.parameters.edge[3] = float("inf")
    with pytest.raises(RunError, match=r"step 1: .*nothing was saved"):
        run.save(checkpoint)
    assert not checkpoint.exists()


BAD_CALLS = {
    "sparsity above 1": ({"sparsity": 1.2}, r"must be in \[0, 1\)"),
    "both": ({"sparsity": 0.9, "edges": 3}, "not both"),
    "too many edges": ({"edges": 10**6}, "edges to keep"),
    "no edges": ({"edges": 0}, "edges to keep"),
    "method": ({"method": "magic"}, "methods are edge-pruning, eap, eap-ig"),
    "setting": ({"learning_rat": 1.0}, "no setting 'learning_rat'"),
    "steps": ({"steps": 0}, "steps is 0"),
    "schedule": ({"schedule": "cubic"}, "accepted: linear, logarithmic"),
    "ablation": ({"ablation": "none"}, "accepted: interchange, mean, zero"),
    "published without a size": ({"upstream_compat": True}, "no size to aim at; give edges, sparsity, a preset or"),
    "target of no writer masks": ({"node_masks": False, "node_target": 0.5}, "node_target is 0.5, and there are no"),
    "preset with such a target": (
        {"settings": preset("ioi"), "node_masks": False},
        "silent_node_target is 0.72, and there are no",
    ),
    "logarithmic to nothing": ({"schedule": "logarithmic", "edge_target": 1.0}, "edge_target is 1.0; with a log"),
    "logarithmic writers": ({"schedule": "logarithmic", "node_target": 1.5}, "node_target is 1.5; with a log"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(model, case):
    call, message = BAD_CALLS[case]
    with pytest.raises(InputError, match=message):
        discover(model, make_task(), **call)


@pytest.mark.parametrize("size", [{}, {"edges": 1}])
def test_a_logarithmic_schedule_aims_below_1_at_any_size(model, size):
    found = discover(model, make_task(), settings=QUICK, schedule="logarithmic", **size)
    targets = found.history[:, found.columns.index("edge_target")]
    assert targets.diff().min() >= 0
    assert targets[-1] == 1 - found.circuit.num_edges / model.graph.num_edges


def test_changing_the_steps_scales_the_warm_ups():
    settings = Settings(steps=100, learning_rate_warmup=10, sparsity_warmup=80).changed({"steps": 50})
    assert (settings.learning_rate_warmup, settings.sparsity_warmup) == (5, 40)
    kept = Settings(steps=100, learning_rate_warmup=10).changed({"steps": 50, "learning_rate_warmup": 7})
    assert kept.learning_rate_warmup == 7


def test_a_warm_start_learns_a_tenth_as_fast_unless_told_otherwise():
    assert Settings().changed({"warm_start": "eap"}).learning_rate == pytest.approx(0.1 * Settings().learning_rate)
    assert Settings().changed({"warm_start": "eap", "learning_rate": 0.7}).learning_rate == 0.7
    assert Settings(warm_start="eap").changed({"warm_start": "eap-ig"}).learning_rate == Settings().learning_rate
    assert Settings().changed({"warm_start": None}).learning_rate == Settings().learning_rate


def test_a_warm_start_is_ahead_after_a_few_steps():
    model, task = load_model("stories260K"), load_task("pronoun-212", load_tokenizer("stories260K"))
    cold, warm = (
        discover(model, task, edges=170, steps=40, refine=False, warm_start=start).circuit for start in (None, "eap")
    )
    reached = [evaluate(model, circuit, task)["kl"] for circuit in (cold, warm)]
    assert reached[1] < 0.5 * reached[0]


def test_restricted_answers_train_on_those_tokens_only(model):
    task = dataclasses.replace(make_task(), answer_tokens=(1, 2, 3))
    reference = Reference(model, task.split("train"), answer_tokens=task.answer_tokens)
    batch = reference.batch(torch.arange(3))
    assert batch.answers.log_probs.shape == (6, 3)
    torch.testing.assert_close(batch.answers.log_probs.exp().sum(1), torch.ones(6))
    found = discover(model, task, edges=30, settings=QUICK)
    assert isinstance(found.circuit, Circuit)


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_a_warm_start_begins_with_the_best_edges_on(model, ablation):
    ranking = np.random.default_rng(0).permutation(model.graph.num_edges).astype(float)
    settings = dataclasses.replace(QUICK, warm_start="eap-ig", ablation=ablation)
    run = EdgePruning(Reference(model, make_task().split("train"), ablation), 20, settings, ranking=ranking)
    order = run.parameters.edge.detach().numpy()
    assert (np.argsort(order, kind="stable") == np.argsort(ranking, kind="stable")).all()
    density = warm_density(20, model.graph.num_edges)
    half_off = probability_of_zero(run.parameters.edge.detach()) > 0.5
    assert float(half_off.float().mean()) == pytest.approx(1 - density, abs=1 / model.graph.num_edges)
    run.step()
    run._flush(None)
    assert run.report().edge_target == pytest.approx(1 - density)
    assert run.report().edge_target < run.report().edge_sparsity < 1


def test_a_warm_start_is_resumed_and_recorded(model, tmp_path):
    task, checkpoint = make_task(), tmp_path / "checkpoint.safetensors"
    whole = discover(model, task, edges=20, settings=QUICK, warm_start="eap-ig", checkpoint=checkpoint)
    again = discover(model, task, edges=20, settings=QUICK, warm_start="eap-ig", checkpoint=checkpoint, resume=True)
    assert torch.equal(whole.masks.edge, again.masks.edge)
    assert whole.circuit.provenance["settings"]["warm_start"] == "eap-ig"
    assert not torch.equal(whole.masks.edge, discover(model, task, edges=20, settings=QUICK).masks.edge)
    with pytest.raises(InputError, match="warm_start is 'magic'; accepted: eap, eap-ig, "):
        discover(model, task, edges=20, settings=QUICK, warm_start="magic")

"""Budgets, selection, sizes, confidence intervals, progress, and every kind of bad input."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastcircuit import InputError, MaskedCausalLM, load_task, zoo
from fastcircuit.evaluation.bootstrap import bootstrap
from fastcircuit.evaluation.faithfulness import score as masked_score
from fastcircuit.evaluation.reference import Reference
from fastcircuit.extraction import prune, reference, sweep
from fastcircuit.extraction.ablation import ablation_constants
from fastcircuit.extraction.prune import halves
from fastcircuit.extraction.score import score
from fastcircuit.extraction.size import Sizes
from fastcircuit.submodel.kept import Kept
from tests.extraction.random_models import random_task, sensitive
from tests.extraction.test_ablation import random_circuit
from tests.models.tiny import TINY, tiny_model


@pytest.fixture(scope="module")
def model():
    return MaskedCausalLM(sensitive("llama-biases-head-dim"))


@pytest.fixture(scope="module")
def task():
    return random_task({"train": 16, "test": 5})


@pytest.fixture(scope="module")
def induction():
    model = MaskedCausalLM.from_pretrained("induction-gpt2")
    return model, load_task("induction", AutoTokenizer.from_pretrained(zoo.resolve("induction-gpt2")))


def test_a_hugging_face_model_will_do(task):
    hf_model = sensitive("gpt2")
    found, expected = (prune(given, task, threshold=0.1) for given in (hf_model, MaskedCausalLM(hf_model)))
    assert found.history == expected.history


def test_the_induction_model_keeps_both_heads(induction):
    pruning = prune(*induction)
    assert pruning.kept.heads.all()
    assert pruning.metrics["accuracy_change"].mean >= -0.01


def test_kl_budget_caps_the_kl(model, task):
    free = prune(model, task, threshold=0.3)
    capped = prune(model, task, threshold=0.3, kl_budget=free.kl / 2)
    assert capped.kl < free.kl / 2
    assert capped.size > free.size


@pytest.mark.parametrize("size", [0.9, 0.5, 0.3])
def test_a_size_budget_alone_is_kept(model, task, size):
    chosen = prune(model, task, size_budget=size)
    assert chosen.size <= size
    assert chosen.kl <= prune(model, task, threshold=1e6, size_budget=size).kl


def test_a_size_budget_out_of_reach_is_said(model, task):
    with pytest.raises(InputError, match=r"threshold 1e-09 ends at a size of .*, above the size_budget of 0\.5; give"):
        prune(model, task, threshold=1e-9, size_budget=0.5)


def test_size_budget_stops(model, task):
    free = prune(model, task, threshold=0.3)
    stopped = prune(model, task, threshold=0.3, size_budget=0.8)
    assert stopped.size <= 0.8
    assert [c.name for c in stopped.history] == [c.name for c in free.history][: len(stopped.history)]
    before = dataclasses.replace(stopped, kept=Kept(stopped.kept.heads.copy(), stopped.kept.mlps.copy()))
    last = stopped.history[-1]
    assert last.removed
    if last.head is None:
        before.kept.mlps[last.layer] = True
    else:
        before.kept.heads[last.layer, last.head] = True
    assert Sizes.of(model, stopped.constants.mlps[0].numel()).fraction(before.kept) > 0.8


def test_select(model, task):
    swept = sweep(model, task, [0.001, 0.03, 0.1, 1.0])
    assert [point.threshold for point in swept.points] == [0.001, 0.03, 0.1, 1.0]
    kls = sorted(point.kl for point in swept.points)
    chosen = swept.select(kl_budget=kls[1])
    assert chosen.kl <= kls[1]
    assert chosen.size == min(point.size for point in swept.points if point.kl <= kls[1])
    assert swept.select(size_budget=0.999).size <= 0.999
    with pytest.raises(InputError, match="one of them"):
        swept.select()
    with pytest.raises(InputError, match=r"no threshold tried reaches a size of 0\.0001 with anything left"):
        swept.select(size_budget=0.0001)
    with pytest.raises(InputError, match="no threshold reaches a KL of -1; the least is"):
        swept.select(kl_budget=-1)


@pytest.mark.parametrize("name", TINY)
def test_sizes_are_those_of_the_model(name):
    model = MaskedCausalLM(tiny_model(name))
    parts = dict(model.model.named_parameters())
    norms = ("ln_", "norm", "wte", "wpe", "embed", "lm_head")
    expected = sum(value.numel() for key, value in parts.items() if not any(norm in key for norm in norms))
    sizes = Sizes.of(model, constant=0)
    assert sizes.total == expected
    assert sizes.fraction(reference.everything(model)) == 1


def test_a_key_value_head_counts_until_its_group_is_gone():
    sizes = Sizes.of(MaskedCausalLM(tiny_model("llama")), constant=24)  # 4 heads of 6, 2 key/value heads, width 24
    kept = reference.everything(MaskedCausalLM(tiny_model("llama")))
    kept.heads[0, 0] = False
    assert sizes.total - sizes.parameters(kept) == 2 * 24 * 6 - 24
    kept.heads[0, 1] = False
    assert sizes.total - sizes.parameters(kept) == 6 * 24 * 6 - 24
    kept.mlps[1] = False
    assert sizes.total - sizes.parameters(kept) == 6 * 24 * 6 + 3 * 24 * 40 - 2 * 24


def test_metrics_are_those_of_masked_nodes(model):
    """Point estimates against evaluation/, over more than one chunk, with several answers per prompt."""
    task = load_task("pronoun-212", AutoTokenizer.from_pretrained(zoo.resolve("stories260K")))
    model = MaskedCausalLM.from_pretrained("stories260K", dtype=torch.float64)
    train, test = task.split("train"), task.split("test")
    constants = ablation_constants(model, train, "zero", "split")
    kept, masks = random_circuit(model)
    (found,) = score(model, constants, [kept], test, task.answer_tokens)
    expected = masked_score(Reference(model, test, "zero", "split", task.answer_tokens), masks)
    for name in ("kl", "accuracy", "exact_match", "logit_difference", "model_accuracy", "model_logit_difference"):
        assert found[name].mean == pytest.approx(expected[name], rel=1e-6), name
    assert found["accuracy_change"].mean == pytest.approx(expected["accuracy"] - expected["model_accuracy"])


def test_bootstrap_covers_the_mean():
    intervals = bootstrap(np.random.default_rng(0).normal(size=(200, 100)))
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.88 < covered < 0.99
    widths = np.array([interval.high - interval.low for interval in intervals])
    assert widths.mean() == pytest.approx(2 * 1.96 / 100**0.5, rel=0.1)


def test_bootstrap_leaves_out_what_is_not_defined():
    values = np.array([[1.0, np.nan, 3.0, np.nan], [1.0, 1.0, 1.0, 1.0]])
    some, same = bootstrap(values)
    assert (some.mean, some.low, some.high) == (2.0, 1.0, 3.0)
    assert (same.mean, same.low, same.high) == (1.0, 1.0, 1.0)


def test_answer_tokens_restrict_accuracy(model):
    task = random_task({"train": 8, "test": 6})
    right = task.split("test").answers
    tokens = tuple(right[right >= 0].unique().tolist()[:1])
    restricted = dataclasses.replace(task, answer_tokens=tokens)
    assert prune(model, restricted, threshold=0.05).metrics["exact_match"].mean == 1.0


def test_halves_are_disjoint_and_seeded():
    task = random_task({"train": 21}, longest=9)
    patching, validation = halves(task, seed=3)
    assert len(patching) == len(validation) == 10
    again = halves(task, seed=3)[0]
    assert torch.equal(patching.input_ids, again.input_ids)
    assert len(halves(task, most_examples=4)[0]) == 4


def test_progress_and_ctrl_c(model, task):
    seen = []
    prune(model, task, threshold=0.1, on_candidate=lambda done, total: seen.append((done, total)))
    total = model.graph.num_layers * (model.graph.num_heads + 1)
    assert seen == [(done, total) for done in range(1, total + 1)]

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        prune(model, task, threshold=0.1, on_candidate=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_threshold_that_prunes_everything(model, task, mode):
    with pytest.raises(InputError, match="threshold 1e\\+06 prunes every head and MLP; no removal costs more than"):
        prune(model, task, threshold=1e6, mode=mode)
    assert sweep(model, task, [1e6]).points[0].is_empty
    assert not prune(model, task, threshold=1e6, include_mlps=False).is_empty


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_nan_weights(task, mode, ablation):
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or infinity"):
        prune(broken, task, mode=mode, ablation=ablation)


def test_too_few_examples(model):
    with pytest.raises(InputError, match="has 1 train example; extraction needs at least 2"):
        prune(model, random_task({"train": 1, "test": 1}))
    with pytest.raises(InputError, match="no split 'test'"):
        prune(model, random_task({"train": 4}))


def test_unequal_lengths(model):
    with pytest.raises(InputError, match="needs prompts of equal length"):
        prune(model, random_task({"train": 8, "test": 4}), ablation="mean-positional")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0; give a finite number of nats above 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"kl_budget": -1.0}, "kl_budget is -1.0"),
        ({"size_budget": 1.5}, "size_budget is 1.5"),
        ({"mode": "quick"}, "accepted: fast, reference"),
        ({"head_order": "random"}, "accepted: code, paper"),
        ({"ablation": "noise"}, "accepted: mean, mean-positional, zero"),
        ({"most_examples": 0}, "most_examples is 0"),
    ],
)
def test_bad_options(model, task, option, message):
    with pytest.raises(InputError, match=message):
        prune(model, task, **option)
    with pytest.raises(InputError, match="no thresholds"):
        sweep(model, task, [])


def test_tokens_outside_the_vocabulary(model):
    with pytest.raises(InputError, match="vocabulary"):
        prune(model, random_task({"train": 8, "test": 4}, vocabulary=500))

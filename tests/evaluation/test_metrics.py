"""Metrics against sums written out, which of them a task has, sizes in every convention."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation import metrics
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.evaluation.size import sizes
from fastcircuit.graph import Graph
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Pair, Task
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model

YEARS = tuple(range(7, 37))  # 30 tokens that stand for 00..29


def ordered_task(num=5):
    """Prompts whose answer is any token after their last one, among YEARS."""
    rng = np.random.default_rng(0)

    def row():
        start = [int(token) for token in rng.integers(41, size=4)]
        year, other = (int(rng.integers(1, len(YEARS) - 1)) for _ in range(2))
        return Pair(
            clean=(*start, YEARS[year]),
            corrupted=(*start, YEARS[other]),
            positions=(4,),
            answers=(YEARS[year + 1],),
            distractors=(YEARS[year],),
        )

    splits = {name: Examples.from_pairs([row() for _ in range(num)]) for name in ("train", "test")}
    return Task("years", splits, YEARS, "Later years.", ordered=True)


def test_metrics_of_ordered_answers_equal_the_sums():
    model, task = MaskedCausalLM(tiny_model("gpt2")), ordered_task()
    circuit = Circuit(model.graph, np.random.default_rng(0).random(model.graph.num_edges) < 0.6)
    found = evaluate(model, circuit, task)
    expected = {name: [] for name in ("accuracy", "probability_difference", "probability_difference_10", "kendall_tau")}
    examples = task.split("test")
    for clean, corrupted, distractors in zip(
        examples.input_ids, examples.corrupted_input_ids, examples.distractors, strict=True
    ):
        year = YEARS.index(int(distractors[-1]))
        full = model(clean[None]).logits[0, -1, list(YEARS)].softmax(-1).tolist()
        masked = model(clean[None], corrupted_input_ids=corrupted[None], masks=Masks.from_circuit(circuit))
        own = masked.logits[0, -1, list(YEARS)].softmax(-1).tolist()
        expected["accuracy"].append(float(own.index(max(own)) > year))
        expected["probability_difference"].append(sum(own[year + 1 :]) - sum(own[:year]))
        near = sum(own[year + 1 : year + 11]) - sum(own[max(0, year - 10) : year])
        expected["probability_difference_10"].append(near)
        pairs = list(combinations(range(len(YEARS)), 2))
        agree = sum(1 if (full[i] - full[j]) * (own[i] - own[j]) > 0 else -1 for i, j in pairs)
        expected["kendall_tau"].append(agree / len(pairs))
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-9), name
    assert "model_probability_difference" in found
    assert "model_kendall_tau" not in found


def test_kendall_tau_by_hand():
    first = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [1, 1, 1, 1]])
    second = torch.tensor([[1.0, 2, 3, 4], [4, 3, 1, 2], [1, 2, 3, 4], [1, 2, 3, 4]])
    found = metrics.kendall_tau(first, second)
    # Second row: of 6 pairs one agrees. Third: two pairs are tied in one of the two, 4 agree.
    assert found[:3].tolist() == pytest.approx([1, -4 / 6, 4 / math.sqrt(4 * 6)])
    assert found[3].isnan()


def test_kendall_tau_in_pieces(monkeypatch):
    values = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0))
    whole = metrics.kendall_tau(*values)
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 60)
    assert torch.equal(metrics.kendall_tau(*values), whole)


def test_differences_of_probabilities():
    log_probs = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]], dtype=torch.float64).log()
    right, wrong = torch.tensor([2, 2]), torch.tensor([0, metrics.NO_TOKEN])
    found = metrics.probability_difference(log_probs, right, wrong)
    assert found[0].item() == pytest.approx(0.6)
    assert found[1].isnan()
    boundary = torch.tensor([1, metrics.NO_TOKEN])
    assert metrics.range_probability_difference(log_probs, boundary)[0].item() == pytest.approx(0.6)
    assert metrics.range_probability_difference(log_probs, boundary)[1].isnan()
    assert metrics.range_accuracy(log_probs, boundary)[0] == 1


def test_the_task_decides_which_metrics_apply():
    model = MaskedCausalLM(tiny_model("gpt2"))
    full = Circuit.full(model.graph)
    assert set(evaluate(model, full, make_task(), metrics=["kl", "kl"])) == {"kl", "examples"}
    names = {name for name in evaluate(model, full, make_task()) if not name.startswith("model_")}
    assert names == {"kl", "accuracy", "exact_match", "logit_difference", "probability_difference", "examples"}
    assert evaluate(model, full, ordered_task())["kendall_tau"] == pytest.approx(1)
    with pytest.raises(InputError, match=r"needs answers that have an order, which .* has not; its metrics are kl"):
        evaluate(model, full, make_task(), metrics=["probability_difference_10"])
    with pytest.raises(InputError, match="no metric 'KL'; metrics are kl, accuracy"):
        evaluate(model, full, make_task(), metrics=["KL"])
    with pytest.raises(InputError, match="no metric is named"):
        evaluate(model, full, make_task(), metrics=[])


def test_bootstrap_intervals_are_of_the_examples():
    model, task = MaskedCausalLM(tiny_model("gpt2")), make_task()
    circuit = Circuit(model.graph, np.arange(model.graph.num_edges) % 2 == 0)
    found = evaluate(model, circuit, task, resamples=200, confidence=0.9)
    again = evaluate(model, circuit, task, resamples=200, confidence=0.9)
    assert found == again
    low, high = found["intervals"]["kl"]
    assert low < found["kl"] < high
    wider = evaluate(model, circuit, task, resamples=200, confidence=0.99)["intervals"]["kl"]
    assert wider[0] <= low < high <= wider[1]
    with pytest.raises(InputError, match="confidence is 95"):
        evaluate(model, circuit, task, resamples=10, confidence=95)


def test_an_empty_split_is_refused():
    task = make_task()
    empty = Task("nothing", {**task.splits, "test": task.split("test").select([])}, None, "")
    model = MaskedCausalLM(tiny_model("gpt2"))
    with pytest.raises(InputError, match="split 'test' of task nothing is empty"):
        evaluate(model, Circuit.full(model.graph), empty)


def test_sizes_in_every_convention():
    graph = Graph(12, 12, 12, "split")
    found = sizes(Circuit.full(graph))
    totals = {name: counts["total_edges"] for name, counts in found["conventions"].items()}
    assert totals == {"split": 32_936, "joint": 32_491, "none": 32_046}
    assert all(counts["edges"] == counts["total_edges"] for counts in found["conventions"].values())
    edges = [("tok_embeds", "m0"), ("pos_embeds", "m0"), ("tok_embeds", "resid_post"), ("m0", "resid_post")]
    found = sizes(Circuit.from_edges(graph, [*edges, ("a3.h2", "m7")]))
    assert {name: counts["edges"] for name, counts in found["conventions"].items()} == {
        "split": 5,
        "joint": 4,
        "none": 2,
    }
    assert (found["edges"], found["effective_edges"]) == (5, 4)
    assert (found["writers"], found["total_writers"], found["readers"]) == (4, 158, 3)
    assert found["sparsity"] == 1 - 5 / 32_936
    assert list(sizes(Circuit.full(Graph(2, 2, 1, "none")))["conventions"]) == ["none"]

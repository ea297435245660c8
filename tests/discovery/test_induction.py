"""The induction model's circuit is found: a previous-token head feeds the keys of an induction head."""

import pytest

from fastcircuit.discovery import discover
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.tasks import load_task


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_twelve_edges_predict_as_the_model_does_and_compose_the_two_heads(seed):
    model = load_model("induction-gpt2")
    task = load_task("induction", load_tokenizer("induction-gpt2"), sizes={"train": 128, "test": 512})
    found = discover(model, task, edges=12, steps=25, seed=seed).circuit
    assert (found.num_edges, model.graph.num_edges) == (12, 32)
    assert ("a0.h0", "a1.h0.k") in found.edges
    scores = evaluate(model, found, task, "test")
    assert scores["kl"] <= 0.02
    assert scores["accuracy"] >= 0.99 * scores["model_accuracy"]

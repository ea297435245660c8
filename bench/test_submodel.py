"""Submodels at GPT-2 small shape beside the Hugging Face model: ``pytest bench/test_submodel.py [--check-floors]``.

With floors: at batch 32 the prefill's speed-up is within 15 % of its bound, and the smallest circuit with the logits of
two answer tokens is at least 6 times as fast as the model.
"""

import numpy as np
import pytest
import torch

from bench.cases.training_step import GPT2_SMALL, random_model
from fastcircuit.submodel.compile import compile_submodel
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.submodel.speed import measure_speed

BATCH, TOKENS, ROUNDS = 32, 16, 9
OF_BOUND, ANSWERS_FLOOR = 0.85, 6.0
CIRCUITS = {"2 heads, 12 MLPs": (2, 12), "9 heads, 5 MLPs": (9, 5), "2 heads, 3 MLPs": (2, 3)}


@pytest.fixture(scope="module")
def model():
    return random_model(GPT2_SMALL)


def circuit(model, heads: int, mlps: int, answers=None):
    """A submodel that keeps so many heads and MLPs, spread over the layers; the rest writes its (zero) mean."""
    layers, count, width = GPT2_SMALL.layers, GPT2_SMALL.heads, GPT2_SMALL.width // GPT2_SMALL.heads
    kept = Kept(np.zeros((layers, count), dtype=bool), np.zeros(layers, dtype=bool))
    for number in range(heads):
        kept.heads[layers // 2 + number % (layers // 2), number] = True
    kept.mlps[np.linspace(0, layers - 1, mlps).round().astype(int)] = True
    constants = Constants(torch.zeros(layers, count, 1, width), torch.zeros(layers, 1, GPT2_SMALL.width))
    return compile_submodel(model, kept, constants, answer_tokens=answers, last_position_only=answers is not None)


@pytest.mark.parametrize("name", CIRCUITS)
def test_prefill(model, name, check_floors, keep, report_row):
    submodel = circuit(model, *CIRCUITS[name]).eval()
    row = measure_speed(model, submodel, TOKENS, (BATCH,), ROUNDS)[0]
    _report(name, row, keep, report_row)
    assert row.speedup <= row.bound * 1.1
    if check_floors:
        assert row.speedup >= OF_BOUND * row.bound


def test_answers_only(model, check_floors, keep, report_row):
    submodel = circuit(model, *CIRCUITS["2 heads, 3 MLPs"], answers=[5, 9]).eval()
    row = measure_speed(model, submodel, TOKENS, (BATCH,), ROUNDS)[0]
    _report("2 heads, 3 MLPs, 2 answer tokens", row, keep, report_row)
    assert row.speedup <= row.bound * 1.1
    if check_floors:
        assert row.speedup >= ANSWERS_FLOOR


def _report(name, row, keep, report_row):
    keep("submodel", [{"circuit": name, **row.to_dict()}])
    report_row(
        f"GPT-2 small, {name}, prefill of {BATCH} x {TOKENS}",
        f"{row.original_ms:.0f} ms and {row.submodel_ms:.0f} ms, {row.speedup:.2f}x of at most {row.bound:.2f}x",
    )

"""Every seed is a run of its own: the noise of its masks and its batches are those of no other seed, and of no step.

A generator of torch on the CPU keeps the low 32 bits of its seed: what tells runs apart must reach those.
"""

import dataclasses

import pytest
import torch

from fastcircuit.discovery.edge_pruning import EdgePruning, _step_seed
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import QUICK, make_task
from tests.models.tiny import tiny_model

STEPS = 3
SEEDS = (0, 1, 2, 1000)


@pytest.fixture(scope="module")
def reference():
    return Reference(MaskedCausalLM(tiny_model("gpt2", torch.float32)), make_task().split("train"))


def drawn(reference, seed):
    """The uniform numbers that the masks of the first steps of a run are made from, ``[STEPS, edges + writers]``."""
    run, seen = EdgePruning(reference, 40, dataclasses.replace(QUICK, seed=seed)), []
    draw = run.parameters.draw

    def noted(step, generator=None):
        seen.append(draw(step, generator).clone())
        return seen[-1]

    run.parameters.draw = noted
    for _ in range(STEPS):
        run.step()
    return torch.stack(seen)


def batches(reference, seed):
    run = EdgePruning(reference, 40, dataclasses.replace(QUICK, seed=seed))
    return [run.batch_indices(step).tolist() for step in range(STEPS)]


def test_seeds_and_steps_draw_different_masks(reference):
    noise = torch.cat([drawn(reference, seed) for seed in SEEDS])
    assert len({tuple(row.tolist()) for row in noise}) == len(SEEDS) * STEPS
    # Not merely different: neighbours have nothing to do with each other.
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 6 / noise.shape[1] ** 0.5


def test_the_same_seed_draws_the_same_masks_and_batches(reference):
    assert torch.equal(drawn(reference, 7), drawn(reference, 7))
    assert batches(reference, 7) == batches(reference, 7)


def test_seeds_draw_different_batches(reference):
    assert len({str(batches(reference, seed)) for seed in SEEDS}) == len(SEEDS)


def test_the_bits_that_a_generator_keeps_tell_seeds_and_steps_apart():
    kept = {_step_seed(seed, step) & 0xFFFFFFFF for seed in range(20) for step in range(20)}
    assert len(kept) == 400

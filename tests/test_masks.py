"""The hard-concrete distribution, schedules and the Lagrangian."""

import math
from itertools import pairwise

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.graph import Graph
from fastcircuit.masks import (
    Lagrangian,
    Masks,
    probability_of_zero,
    sample,
    sample_at,
    target_sparsity,
    without_dead_ends,
)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 1.5, 4.0])
def test_probability_of_zero_is_the_frequency_of_zeros(log_alpha):
    values = torch.full((200_000,), log_alpha, dtype=torch.float64)
    zeros = (sample(values, torch.Generator().manual_seed(0)) == 0).double().mean()
    expected = probability_of_zero(values[:1])[0]
    assert abs(zeros - expected) < 5 * math.sqrt(expected * (1 - expected) / len(values)) + 2e-6


def test_samples_follow_the_formula():
    log_alpha = torch.linspace(-3, 3, 7, dtype=torch.float64)
    uniform = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    concrete = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / (2 / 3))
    torch.testing.assert_close(sample_at(log_alpha, uniform), (concrete * 1.2 - 0.1).clamp(0, 1))


def test_gradient_is_zero_exactly_where_the_clamp_holds():
    log_alpha = torch.zeros(1000, requires_grad=True)
    z = sample(log_alpha, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
    inside = (z > 0) & (z < 1)
    assert inside.any()
    assert (~inside).any()
    assert torch.equal(gradient != 0, inside)


def test_samples_repeat_with_the_seed():
    values = torch.zeros(50)
    first, again, other = (sample(values, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_targets_linear_and_logarithmic():
    assert [target_sparsity(step, 10, 0.8) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.4, 0.8, 0.8])
    logarithmic = [1 - target_sparsity(step, 4, 0.99, "logarithmic") for step in range(5)]
    ratios = [b / a for a, b in pairwise(logarithmic)]
    assert ratios == pytest.approx([0.01**0.25] * 4)
    with pytest.raises(InputError, match="below 1"):
        target_sparsity(0, 4, 1.1, "logarithmic")
    with pytest.raises(InputError, match="accepted: linear, logarithmic"):
        target_sparsity(0, 4, 0.9, "cubic")


def test_lagrangian_is_signed_and_can_be_quadratic_only():
    both, quadratic = Lagrangian(), Lagrangian(linear_term=False)
    sparsity = torch.tensor(0.25, requires_grad=True)
    with torch.no_grad():
        for term in (*both.parameters(), *quadratic.parameters()):
            term.fill_(2.0)
    assert both(sparsity, 0.5).item() == pytest.approx(2 * -0.25 + 2 * 0.0625)
    assert not quadratic.linear.requires_grad


def test_product_multiplies_each_edge_by_its_writer():
    graph = Graph(2, 2, 2, "split")
    edge, node = torch.rand(graph.num_edges), torch.rand(graph.num_writers)
    product = Masks(edge, node).product(graph)
    for number, (writer, _) in enumerate(graph.edges):
        assert product[number] == edge[number] * node[graph.writer_id(writer)]
    with pytest.raises(InputError, match=r"masks\.node has shape"):
        Masks(edge, node[1:]).product(graph)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dead_ends_are_those_that_lead_nowhere(kv_heads):
    graph = Graph(3, 4, kv_heads, "split")
    generator = torch.Generator().manual_seed(0)
    product, uniform = torch.rand(2, graph.num_edges, generator=generator)
    product = torch.where(uniform < 0.1, product, 0)
    _, readers = graph.live((product != 0).numpy())
    leads_on = torch.from_numpy(readers[graph.edge_readers])
    assert torch.equal(without_dead_ends(graph, product, rounds=6), torch.where(leads_on, product, 0))
    once = without_dead_ends(graph, product, rounds=1)
    assert 0 < (once != product).sum() <= (product[~leads_on] != 0).sum()

"""Compiled programs: their circuits are known, and are found exactly.

The ground truth is that of Conmy et al. 2023 (ACDC, zero ablation; MIT licence) and of auto-circuit (zero and resample
ablation): ``data/tracr_*.json``, written down from their code. Figure 4 of the Edge Pruning paper shows the canonical
circuits of both programs, under zero ablation "following Conmy et al.", with token and position embeddings as two
writers, as ACDC has them. auto-circuit merges them into one.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import discover, preset
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.refine import Refiner
from fastcircuit.errors import InputError
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.evaluation.reference import Reference
from fastcircuit.extraction.extract import extract
from fastcircuit.masks import Masks
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.tasks import load_task

DATA = Path(__file__).parent / "data"
PROGRAMS = ("reverse", "xproportion")
EMBEDDINGS = {"hook_embed": "tok_embeds", "hook_pos_embed": "pos_embeds"}
# The canonical circuits that figure 4 of the Edge Pruning paper draws, edge by edge.
FIGURE_4 = {
    "reverse": {
        ("tok_embeds", "a0.h0.v"),
        ("tok_embeds", "m0"),
        ("a0.h0", "m0"),
        ("tok_embeds", "m1"),
        ("pos_embeds", "m1"),
        ("m0", "m1"),
        ("m1", "m2"),
        ("m2", "a3.h0.q"),
        ("pos_embeds", "a3.h0.k"),
        ("tok_embeds", "a3.h0.v"),
        ("a3.h0", "resid_post"),
    },
    "xproportion": {
        ("tok_embeds", "m0"),
        ("tok_embeds", "a1.h0.q"),
        ("pos_embeds", "a1.h0.q"),
        ("tok_embeds", "a1.h0.k"),
        ("pos_embeds", "a1.h0.k"),
        ("m0", "a1.h0.v"),
        ("a1.h0", "resid_post"),
    },
}
BUDGET = 0.01  # nats; the cheapest edge of either circuit costs 0.08
TRACR = preset("tracr")


def model_and_task(program, embedding_nodes="split"):
    name = f"tracr-{program}"
    return load_model(name, embedding_nodes=embedding_nodes), load_task(name, load_tokenizer(name))


def published(program, key):
    return json.loads((DATA / f"tracr_{program}.json").read_text())[key]


def acdc_edges(program):
    """ACDC's list in our names, without what joins the parts of one component."""
    edges = set()
    for receiver, _, sender, _ in published(program, "acdc_edges_receiver_first"):
        if receiver.endswith(("hook_resid_post", "hook_mlp_in", "hook_q_input", "hook_k_input", "hook_v_input")):
            edges.add((_writer(sender), _reader(receiver)))
    return edges


def _writer(hook):
    if hook in EMBEDDINGS:
        return EMBEDDINGS[hook]
    _, layer, *rest = hook.split(".")
    return f"m{layer}" if rest == ["hook_mlp_out"] else f"a{layer}.h0"


def _reader(hook):
    _, layer, place = hook.split(".")
    if place == "hook_resid_post":
        return "resid_post"
    return f"m{layer}" if place == "hook_mlp_in" else f"a{layer}.h0.{place[len('hook_')]}"


def auto_circuit_edges(program, ablation):
    """auto-circuit's list in our names, over the graph with one embedding writer."""
    key = {
        "zero": "zero_ablation_edges_auto_circuit_names",
        "interchange": "resample_ablation_edges_auto_circuit_names",
    }
    edges = set()
    for edge in published(program, key[ablation]):
        sender, receiver = edge.split("->")
        edges.add((_auto_circuit_name(sender), _auto_circuit_name(receiver)))
    return edges


def _auto_circuit_name(name):
    if name in ("Resid Start", "Resid End"):
        return "embeds" if name == "Resid Start" else "resid_post"
    if name.startswith("MLP "):
        return f"m{name[4:]}"
    layer, head, *part = name[1:].split(".")
    return ".".join([f"a{layer}", f"h{head}", *(each.lower() for each in part)])


def merged(edges):
    return {("embeds" if writer.endswith("_embeds") else writer, reader) for writer, reader in edges}


@pytest.mark.parametrize(("program", "size"), [("reverse", 11), ("xproportion", 7)])
def test_the_two_published_zero_ablation_sets_agree_edge_by_edge(program, size):
    assert len(acdc_edges(program)) == size
    assert acdc_edges(program) == FIGURE_4[program]
    assert merged(acdc_edges(program)) == auto_circuit_edges(program, "zero")


@pytest.mark.parametrize("nodes", ["split", "joint"])
@pytest.mark.parametrize("ablation", ["zero", "interchange"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_published_set_is_every_edge_the_program_needs_and_no_other(program, ablation, nodes):
    """Removed alone from the whole program, an edge of the set costs something and any other edge nothing."""
    model, task = model_and_task(program, nodes)
    refiner = Refiner(Reference(model, task.split("train"), ablation))
    full, needed = Circuit.full(model.graph, ablation=ablation), set()
    for number, edge in enumerate(model.graph.edges):
        without = Circuit(model.graph, full.keep & (np.arange(model.graph.num_edges) != number), ablation=ablation)
        kl = refiner.kl(without)
        assert kl < 1e-6 or kl > 0.05
        if kl > 0.05:
            needed.add(edge)
    assert refiner.kl(Circuit.from_edges(model.graph, needed, ablation=ablation)) < 1e-6
    assert merged(needed) == auto_circuit_edges(program, ablation)
    if (ablation, nodes) == ("zero", "split"):
        assert needed == acdc_edges(program)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_seed_finds_the_published_zero_ablation_circuit_exactly(program, seed):
    model, task = model_and_task(program)
    run = discover(model, task, kl_budget=BUDGET, settings=TRACR, seed=seed)
    found = run.circuit
    assert set(found.edges) == acdc_edges(program)
    assert run.history[-1, 3] > 0.6  # the masks have come down, elimination had not everything to do
    if program == "xproportion":  # and rank the edges, nearly all pairs of them as they should be, without it
        learned = run.masks.edge.numpy()
        assert (learned[found.keep][:, None] > learned[~found.keep]).mean() > 0.98
    if seed == 0:
        scores = evaluate(model, found, task, "test")  # lists of lengths it was not found on
        assert scores["kl"] < 1e-6
        assert scores["accuracy"] == pytest.approx(1)


@pytest.mark.parametrize("program", PROGRAMS)
def test_interchange_ablation_finds_the_published_resample_circuit_exactly(program):
    model, task = model_and_task(program)
    found = discover(model, task, kl_budget=BUDGET, settings=TRACR, ablation="interchange").circuit
    assert merged(found.edges) == auto_circuit_edges(program, "interchange")
    assert found.num_edges == len(auto_circuit_edges(program, "interchange"))


def test_what_a_budget_leaves_is_within_it_and_needed():
    model, task = model_and_task("xproportion")
    refiner = Refiner(Reference(model, task.split("train"), "zero"))
    left = refiner.eliminate_within(Circuit.full(model.graph, ablation="zero"), 1.0)
    assert refiner.kl(left) <= 1.0
    for edge in np.flatnonzero(left.keep):
        keep = left.keep.copy()
        keep[edge] = False
        assert refiner.kl(Circuit(model.graph, keep, ablation="zero")) > 1.0
    assert left.num_edges < len(acdc_edges("xproportion"))  # the two edges that matter at BOS alone cost 0.68


def test_the_published_losses():
    """Summed over positions, and for numbers a softmax over the positions of a list; by hand from the final stream."""
    for program in PROGRAMS:
        model, task = model_and_task(program)
        run = EdgePruning(Reference(model, task.split("train"), "zero"), 9, preset(f"tracr-{program}"))
        masks = Masks(torch.rand(model.graph.num_edges, generator=torch.Generator().manual_seed(0)))
        batch = run.reference.batch(torch.arange(5))
        ids = task.split("train").input_ids[:5]
        streams = [
            model.run(ids)[1],
            model.final_read(batch.token_ids, batch.packing, batch.ablated, masks, torch.arange(ids.numel())),
        ]
        if program == "xproportion":
            full, circuit = (stream[:, 0].view(5, -1).log_softmax(1) for stream in streams)
        else:
            full, circuit = (model.model.lm_head(s)[:, :3].view(5, 4, 3)[:, 1:].log_softmax(2) for s in streams)
        expected = (full.exp() * (full - circuit)).sum() / 5
        torch.testing.assert_close(run.stepper.divergence(masks, batch), expected, rtol=1e-3, atol=1e-6)


BAD_BUDGETS = {
    "zero": ({"kl_budget": 0.0}, "kl_budget is 0.0; it must be above 0"),
    "nan": ({"kl_budget": float("nan")}, "it must be above 0"),
    "with edges": ({"kl_budget": 0.1, "edges": 3}, "give one of sparsity, edges and kl_budget"),
    "published": ({"kl_budget": 0.1, "upstream_compat": True}, "not part of the published method"),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_bad_budgets(case):
    call, message = BAD_BUDGETS[case]
    with pytest.raises(InputError, match=message):
        discover(*model_and_task("xproportion"), **call)


def test_extracting_a_submodel_is_refused_before_anything_is_searched():
    searched = []
    with pytest.raises(InputError, match="no submodel can be made of architecture 'tracr'"):
        extract(*model_and_task("reverse"), on_candidate=lambda *_: searched.append(1))
    assert not searched

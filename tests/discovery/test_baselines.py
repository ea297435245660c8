"""Baselines through ``discover``: sizes, files, provenance, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import BaselineSettings, Settings, discover
from fastcircuit.discovery.discovery import METHODS
from fastcircuit.errors import InputError
from fastcircuit.models.masked import MaskedCausalLM
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return MaskedCausalLM(tiny_model("llama", torch.float32))


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("edge-pruning", "acdc")])
def test_attributions_give_the_edges_asked_for(model, method, ablation, tmp_path):
    progress = []
    found = discover(
        model, make_task(4), method, edges=30, ablation=ablation, on_progress=lambda *place: progress.append(place)
    )
    assert found.circuit.num_edges == 30
    assert found.circuit.ablation == ablation
    assert found.circuit.provenance["method"] == method
    assert found.history.shape[0] == 0
    assert progress == ([] if method == "random" else [(method, 4, 4)])
    found.save(tmp_path)
    assert Circuit.load(tmp_path / "circuit.json", model.graph) == found.circuit
    saved = load_file(tmp_path / "masks.safetensors")
    assert saved["edge"].shape == (model.graph.num_edges,)
    assert saved["node"].shape == (model.graph.num_writers,)


def test_other_ways_to_say_how_much_to_keep(model):
    task = make_task(4)
    by_sparsity = discover(model, task, "eap-ig", sparsity=0.9)
    assert by_sparsity.circuit.num_edges == round(0.1 * model.graph.num_edges)
    scores = by_sparsity.masks.edge.numpy()
    threshold = float(np.quantile(np.abs(scores), 0.8))
    by_threshold = discover(model, task, "eap-ig", threshold=threshold).circuit
    assert by_threshold == Circuit(model.graph, np.abs(scores) >= threshold).pruned()
    by_nodes = discover(model, task, "eap-ig", nodes=6).circuit
    assert 1 <= len(by_nodes.nodes) <= 6
    signed = discover(model, task, "eap-ig", edges=20, signed=True).circuit
    assert scores[signed.keep].min() > scores[~signed.keep].min()


def test_dangling_edges_are_kept_on_request(model):
    task = make_task(4)
    plain = discover(model, task, "eap-ig", edges=20)
    kept = discover(model, task, "eap-ig", edges=20, pruned=False)
    best = np.argsort(-np.abs(plain.masks.edge.numpy()), kind="stable")[:20]
    assert set(np.flatnonzero(kept.circuit.keep)) == set(best)
    assert kept.circuit.pruned().num_edges < 20 == plain.circuit.num_edges == plain.circuit.pruned().num_edges
    assert kept.circuit.provenance["settings"]["pruned"] is False
    nodes = [discover(model, task, "eap-ig", nodes=4, pruned=pruned).circuit for pruned in (True, False)]
    assert nodes[0] == nodes[1].pruned()
    found = discover(model, task, "acdc", threshold=1e-5, pruned=False)
    decided = found.history[found.history[:, 2] == 0, 0].long()
    assert sorted(decided.tolist()) == np.flatnonzero(found.circuit.keep).tolist()


@pytest.mark.parametrize(("method", "size"), [("acdc", {"threshold": 1e-4}), ("eap-ig", {"edges": 20})])
def test_all_examples_are_used_unless_fewer_are_asked_for(method, size):
    model, many = MaskedCausalLM(tiny_model("llama")), make_task(300)
    few = dataclasses.replace(many, splits={"train": many.split("train").select(slice(3))})
    whole = discover(model, many, method, **size)
    cut = discover(model, many, method, most_examples=3, **size)
    assert cut.circuit.provenance["settings"]["most_examples"] == 3
    assert whole.circuit.provenance["settings"]["most_examples"] is None
    assert torch.equal(cut.masks.edge, discover(model, few, method, **size).masks.edge)
    last = dataclasses.replace(many, splits={"train": many.split("train").select(slice(256))})
    assert not torch.allclose(whole.masks.edge, discover(model, last, method, **size).masks.edge, rtol=1e-6)


def test_acdc_writes_its_history(model, tmp_path):
    found = discover(model, make_task(4), "acdc", threshold=1e-5)
    assert found.history.shape == (model.graph.num_edges, 4)
    assert found.columns == ("edge", "rise", "removed", "kl")
    kept = found.history[found.history[:, 2] == 0, 0].long()
    whole = Circuit(model.graph, np.isin(np.arange(model.graph.num_edges), kept.numpy()))
    assert found.circuit == whole.pruned()
    assert 0 < found.circuit.num_edges < model.graph.num_edges
    found.save(tmp_path)
    assert torch.equal(load_file(tmp_path / "masks.safetensors")["history"], found.history)


BAD = {
    "method": (("magic",), {}, "methods are edge-pruning, eap, eap-ig"),
    "acdc size": (("acdc",), {"edges": 5}, "acdc takes no edges"),
    "acdc threshold": (("acdc",), {"threshold": -1.0}, "acdc needs a KL rise in nats, 0 or more"),
    "two sizes": (("eap",), {"edges": 5, "threshold": 0.1}, "give edges or threshold, not both"),
    "too many": (("eap",), {"edges": 10**6}, "edges to keep"),
    "too many nodes": (("eap",), {"nodes": 10**6}, "writers to keep"),
    "no examples": (("acdc",), {"most_examples": 0}, "most_examples is 0; it must be at least 1"),
    "setting": (("eap",), {"steps": 3}, "no setting 'steps' without edge-pruning"),
    "loss": (("eap-ig",), {"loss": "hinge"}, "losses are kl, logit-difference, nll"),
    "ablation": (("eap-ig",), {"ablation": "none"}, "accepted: interchange, mean, zero"),
    "settings": (("eap-ig",), {"settings": Settings()}, "method eap-ig takes BaselineSettings"),
    "settings of": (("edge-pruning",), {"settings": BaselineSettings()}, "edge-pruning takes Settings"),
    "resume": (("acdc",), {"resume": True}, "no checkpoint to resume"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(model, case):
    arguments, options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        discover(model, make_task(4), *arguments, **options)

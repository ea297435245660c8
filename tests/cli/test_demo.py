"""``fastcircuit demo``."""

import json
import os
from pathlib import Path

import pytest

from fastcircuit import demo
from fastcircuit.discovery import Settings


@pytest.mark.slow
def test_demo(answer):
    story = answer("demo")
    assert set(story) == {"discover", "extract", "files"}
    assert set(story["discover"]) == {"edges", "total_edges", "sparsity", "test", "seconds"}
    assert set(story["discover"]["test"]) == {"kl", "accuracy", "logit_difference", "exact_match"}
    assert story["discover"]["edges"] == demo.EDGES
    assert story["discover"]["test"]["kl"] <= demo.WORST_KL
    assert story["discover"]["test"]["accuracy"] >= demo.LEAST_ACCURACY
    assert all(Path(file).stat().st_size for file in story["files"])


def test_a_demo_worse_than_stated_fails(run, monkeypatch):
    monkeypatch.setattr(demo, "SETTINGS", Settings(steps=2, refine=False))
    code, out, err = run("demo", "--out", "shown", "--json")
    assert code == 1
    assert json.loads(out)["files"] == [f"shown/{name}" for name in sorted(os.listdir("shown"), key=_as_written)]
    assert err.splitlines()[-1].startswith("error: the demo's circuit has test KL ")


def _as_written(name):
    return ["circuit.json", "masks.safetensors", *demo.PICTURES, demo.SUBMODEL].index(name)

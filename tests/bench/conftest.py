"""Ceilings of small products and streams, so that no test waits for them."""

import pytest

from fastcircuit.benchmarks import ceilings


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 128)

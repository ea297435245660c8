"""The published loop's cost model decides as Algorithm 1 does."""

import pytest

from fastcircuit.benchmarks.models import Shape, random_model
from fastcircuit.benchmarks.suites import extraction
from fastcircuit.benchmarks.suites.extraction import extract, opinionated, published, published_loop

SMALL = Shape(layers=3, heads=4, width=32, vocabulary=101, batch=20, tokens=9)


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_published_decisions(factor):
    model = opinionated(random_model(SMALL), factor).double()
    for threshold in (1e-3, 1e-2, 1e-1):
        (ours,) = extract(model, SMALL, [threshold]).points
        loop = published(model, SMALL, threshold)
        for _ in range(SMALL.layers * (SMALL.heads + 1)):
            loop.step()
        assert loop.removed == [
            (candidate.layer, SMALL.heads if candidate.head is None else candidate.head)
            for candidate in ours.history
            if candidate.removed
        ]
        assert float(loop._kl(loop.current)) == pytest.approx(ours.kl, rel=1e-9)
        loop.close()


def test_the_published_loop_has_no_weights_of_its_own(monkeypatch):
    """It hooks a copy of the model; a second set of weights would be counted as its memory."""
    hooked = []
    monkeypatch.setattr(extraction, "published", lambda model, *about: hooked.append(model) or published(model, *about))
    model = random_model(SMALL)
    published_loop(SMALL, [1e-3], model)
    assert hooked[0] is not model
    assert [weight.data_ptr() for weight in hooked[0].parameters()] == [w.data_ptr() for w in model.parameters()]
    assert not model.transformer.h[0].mlp._forward_hooks

"""The published attribution's cost model gives the scores that ours does."""

import numpy as np
import pytest

from bench.cases.attribution import METHODS, ours, published
from bench.cases.extraction import opinionated
from bench.cases.training_step import Shape, random_model

SMALL = Shape(layers=3, heads=4, width=32, vocabulary=101, batch=5, tokens=9)


@pytest.mark.parametrize("method", METHODS)
def test_published_scores(method):
    model = opinionated(random_model(SMALL)).double()
    expected = published(model, SMALL, method)()
    scores = ours(model, SMALL, method)().edge
    np.testing.assert_allclose(scores, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3

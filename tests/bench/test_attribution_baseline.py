"""The published attribution's cost model gives the scores that ours does."""

import numpy as np
import pytest

from fastcircuit.benchmarks.models import random_model
from fastcircuit.benchmarks.suites.attribution import METHODS, PROOF, ours, published
from fastcircuit.benchmarks.suites.extraction import opinionated


@pytest.mark.parametrize("method", METHODS)
def test_published_scores(method):
    model = opinionated(random_model(PROOF)).double()
    expected = published(model, PROOF, method)()
    scores = ours(model, PROOF, method)().edge
    np.testing.assert_allclose(scores, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3

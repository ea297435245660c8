"""Bootstrap confidence intervals of means over examples."""

from dataclasses import dataclass

import numpy as np

from fastcircuit.errors import InputError

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over examples and its bootstrap confidence interval (percentiles)."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Means of M metrics over N examples, ``[M, N]`` (NaN: not defined for an example), and percentile intervals.

    ``resamples`` times N examples are drawn with replacement, the same ones for every metric.

    Raises:
        InputError: no resamples, or a confidence that is not between 0 and 1.
    """
    check_bootstrap(resamples, confidence)
    generator = np.random.default_rng(seed)
    count = values.shape[1]
    known, filled = ~np.isnan(values), np.nan_to_num(values)
    sums, counts = (np.empty((resamples, len(values))) for _ in range(2))
    for sample in range(resamples):
        times_drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        sums[sample], counts[sample] = filled @ times_drawn, known @ times_drawn
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)  # [resamples, M]
    bounds = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [
        Interval(float(mean), float(low), float(high))
        for mean, low, high in zip(np.nanmean(values, axis=1), *bounds, strict=True)
    ]


def check_bootstrap(resamples: int, confidence: float) -> None:
    """InputError unless intervals can be had from these."""
    if resamples < 1:
        raise InputError(f"bootstrap is {resamples} resamples; give at least 1, such as {RESAMPLES}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; give a number between 0 and 1, such as {CONFIDENCE}")

"""Which components Algorithm 1 tests, in which order, and what it decides."""

from dataclasses import dataclass

HEAD_ORDERS = ("code", "paper")


@dataclass(frozen=True)
class Rule:
    """When a component is removed: ``KL(candidate) - KL(current) < threshold`` and ``KL(candidate) < kl_budget``."""

    threshold: float
    kl_budget: float = float("inf")

    def margin(self, kl: float, current: float) -> float:
        """By how much a candidate passes, in nats; it is removed when this is above 0."""
        return min(self.threshold - (kl - current), self.kl_budget - kl)


@dataclass(frozen=True)
class Candidate:
    """One test of Algorithm 1.

    Args:
        layer, head: the component; head None for the MLP.
        kl: ``KL(original || pruned)`` without it, in nats.
        change: ``kl`` minus that of the model it was removed from.
        margin: by how much it passed the rule; negative: it stays.
    """

    layer: int
    head: int | None
    kl: float
    change: float
    margin: float

    @property
    def removed(self) -> bool:
        return self.margin > 0

    @property
    def name(self) -> str:
        """``a3.h2`` or ``m3``."""
        return f"m{self.layer}" if self.head is None else f"a{self.layer}.h{self.head}"


def layer_order(num_heads: int, head_order: str, include_mlps: bool) -> list[int]:
    """The components of a layer in the order they are tested; number ``num_heads`` is the MLP.

    ``code``: heads ascending, then the MLP (the paper's published code); ``paper``: heads descending, then the MLP
    (its Algorithm 1).
    """
    heads = list(range(num_heads))
    return (heads if head_order == "code" else heads[::-1]) + [num_heads] * include_mlps


@dataclass(frozen=True)
class FloatError:
    """How far two correct ways of computing the same KL may lie apart.

    Rounding perturbs a log-probability by some ``dz``. To first order that moves the KL by ``sum_v (q_v - p_v) dz_v``,
    and ``|q - p|_1 <= sqrt(2 KL)`` (Pinsker); to second order by ``dz^2`` at most; evaluating the KL rounds once more.

    Args:
        noise: rounding error of a log-probability that comes out of the model, ``max |dz|``.
        evaluation: rounding error of a mean of log-probabilities.
    """

    noise: float
    evaluation: float

    def of_change(self, kl: float, current: float) -> float:
        """Error of ``kl - current``."""
        roots = sum((2 * max(value, 0.0)) ** 0.5 for value in (kl, current))
        return self.noise * roots + self.noise**2 + self.evaluation

    def is_tie(self, candidate: Candidate) -> bool:
        """Whether rounding alone could have turned the decision."""
        return abs(candidate.margin) <= self.of_change(candidate.kl, candidate.kl - candidate.change)

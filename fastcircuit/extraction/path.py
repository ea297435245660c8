"""One run of Algorithm 1 at one threshold: where it stands, and what it decided."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastcircuit.errors import RunError
from fastcircuit.extraction.candidates import Candidate, Rule
from fastcircuit.extraction.size import Sizes
from fastcircuit.submodel.kept import Kept

OnCandidate = Callable[[int, int], None]


@dataclass
class Path:
    """The pruned model so far.

    Args:
        rule: decides over a candidate.
        size_budget: no candidate is tested once the model is this small (a fraction, see :class:`Sizes`).
        kept: what is left of the model.
    """

    rule: Rule
    sizes: Sizes
    size_budget: float
    kept: Kept
    kl: float = 0.0
    history: list[Candidate] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.sizes.fraction(self.kept) <= self.size_budget

    def decide(self, layer: int, component: int, kl: float) -> bool:
        """Remove the component if the rule says so, given the KL without it; returns whether it was removed."""
        if not np.isfinite(kl):
            raise RunError(f"the KL is {kl} with a component of layer {layer} removed; use a wider dtype")
        is_mlp = component == self.kept.heads.shape[1]
        margin = self.rule.margin(kl, self.kl)
        candidate = Candidate(layer, None if is_mlp else component, kl, kl - self.kl, margin)
        self.history.append(candidate)
        if candidate.removed:
            self.kl, self.kept = kl, without(self.kept, layer, component)
        return candidate.removed


def without(kept: Kept, layer: int, component: int) -> Kept:
    """``kept`` with one component less: a head of ``layer``, or, numbered after the heads, its MLP."""
    heads, mlps = kept.heads.copy(), kept.mlps.copy()
    if component == heads.shape[1]:
        mlps[layer] = False
    else:
        heads[layer, component] = False
    return Kept(heads, mlps)

"""Algorithm 1, fast: the decisions of reference.py, computing only what a candidate can change.

Layers are visited from the last to the first, so everything below a candidate is still the original model, and its
output is computed once. A candidate costs its own layer from there on, and the pruned layers above it. Candidates are
tested ahead, as one batch, as if each were removed; what follows the first that is not is thrown away.
"""

import numpy as np

from fastcircuit.extraction.blocks import Suffix
from fastcircuit.extraction.evaluator import Evaluator
from fastcircuit.extraction.path import OnCandidate, Path


def prune_paths(
    evaluator: Evaluator, paths: list[Path], order: list[int], on_candidate: OnCandidate | None = None
) -> None:
    """Run every path of Algorithm 1 to its end; they share block inputs and every KL that more than one asks for.

    Args:
        paths: one per threshold, at their beginning; changed in place.
        order: a layer's components in the order they are tested (see ``layer_order``).
        on_candidate: called with the candidates decided so far and how many there are, over all paths.
    """
    layers = evaluator.model.graph.num_layers
    total = len(paths) * layers * len(order)
    suffixes = [Suffix() for _ in paths]
    decided = 0
    for layer in reversed(range(layers)):
        evaluator.enter(layer)
        for index, path in enumerate(paths):
            search = LayerSearch(evaluator, suffixes[index], path, layer)
            for place in range(len(order)):
                if not path.done:
                    search.test(order[place:])
                decided += 1
                if on_candidate is not None:
                    on_candidate(decided, total)
            suffixes[index] = evaluator.grow(suffixes[index], search.removed)


class LayerSearch:
    """The candidates of one layer on one path.

    The batch of candidates tested ahead doubles while all of it turns out to be needed, and starts again from one when
    a candidate is not removed: where rejections are common little is computed in vain.
    """

    def __init__(self, evaluator: Evaluator, suffix: Suffix, path: Path, layer: int) -> None:
        self.evaluator, self.suffix, self.path, self.layer = evaluator, suffix, path, layer
        self.removed = np.zeros(evaluator.model.graph.num_heads + 1, dtype=bool)
        self.width = 1

    def test(self, components: list[int]) -> None:
        """Decide over the first of the components that are still to be tested."""
        trial = self._without(components[:1])
        if not self.evaluator.knows(self.suffix, trial):
            width = min(self.width, len(components), self.evaluator.most_at_once(self.suffix))
            trials = [self._without(components[:count]) for count in range(1, width + 1)]
            self.evaluator.evaluate(self.suffix, trials)
            self.width = 2 * width
        if self.path.decide(self.layer, components[0], self.evaluator.kl(self.suffix, trial)):
            self.removed = trial
        else:
            self.width = 1

    def _without(self, components: list[int]) -> np.ndarray:
        removed = self.removed.copy()
        removed[components] = True
        return removed

"""The choice of the next token, row by row: each sequence of a batch has settings and random numbers of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token; otherwise one is drawn from the ``top_p`` most likely mass."""

    temperature: float
    top_p: float
    seed: int | None


class Sampler:
    """Draws as ``generate(do_sample=True, top_k=0)`` does for one sequence after ``torch.manual_seed(seed)``."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """One token ``[1]`` for ids ``[1, S]`` and scores ``[1, V]``."""
        for warp in self.warpers:
            scores = warp(ids, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[0]


class ChooseTokens(LogitsProcessor):
    """Leaves a row of scores as it is (greedy), or only the token that the row's own sampler has drawn."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self.samplers = [Sampler(sampling, device) if sampling.temperature else None for sampling in samplings]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = scores.clone()
        for row, sampler in enumerate(self.samplers):
            if sampler is not None:
                token = sampler(input_ids[row : row + 1], scores[row : row + 1])
                chosen[row] = -torch.inf
                chosen[row, token] = 0
        return chosen

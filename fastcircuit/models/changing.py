"""The tokens of a batch that can differ from the ablated run, and what the others still contribute.

Up to the first token at which a clean prompt and its corrupted one differ, a causal model writes the same in both
runs: there ``D`` is exactly 0 whatever the masks are, and every reader sees the ablated run. Nothing has to be read,
masked or differentiated at such tokens; later ones only attend to them, to keys and values without masks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastcircuit.models.anatomy import Attention


@dataclass(frozen=True)
class Changing:
    """Which of T packed tokens can change.

    Args:
        tokens: those, in ascending order, ``[S]``.
        others: the rest, in ascending order, ``[T - S]``.
    """

    tokens: Tensor
    others: Tensor

    @classmethod
    def of(cls, flags: Tensor) -> "Changing":
        """From a flag per packed token, bool ``[T]``."""
        return cls(flags.nonzero().squeeze(1), (~flags).nonzero().squeeze(1))

    def places(self, tokens: Tensor) -> Tensor:
        """Where packed tokens, each of which can change, are among those that can."""
        return torch.searchsorted(self.tokens, tokens)

    def fixed_keys_values(self, attention: Attention, base: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the other tokens, ``[KV, T - S, d_head]``, from what readers see there, ``[T - S, d]``."""
        x = attention.norm(base)[None]
        return attention.key(x), attention.value(x)

    def everywhere(self, projected: tuple[Tensor, ...], fixed: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values of all tokens, ``[heads, T, d_head]``, from those of tokens that can change.

        Differentiable in ``projected``. Queries of other tokens are 0: what they find is not looked at.
        """
        query, key, value = projected
        nothing = query.new_zeros(query.shape[0], len(self.others), query.shape[2])
        pairs = ((nothing, query), (fixed[0], key), (fixed[1], value))
        return tuple(torch.cat(pair, dim=1).index_select(1, self._order) for pair in pairs)

    @cached_property
    def _order(self) -> Tensor:
        """Where every token is among the others and then those that can change, ``[T]``."""
        return torch.cat([self.others, self.tokens]).argsort()

"""What an extraction decides: which components stay, and what a removed one writes instead."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kept:
    """Which components stay.

    Args:
        heads: bool ``[L, H]``, query heads.
        mlps: bool ``[L]``.
    """

    heads: np.ndarray
    mlps: np.ndarray


@dataclass(frozen=True)
class Constants:
    """What a removed component writes instead, tensors or arrays.

    Args:
        heads: what each head passes to its output projection, ``[L, H, P, d_head]``; P is 1 (a constant valid at any
            length) or one vector per position.
        mlps: MLP outputs, ``[L, P, d]``.
        has_output_bias: False when zero ablation with the bias convention ``split`` removes 1/H of ``b_O`` with each
            head (as in :class:`fastcircuit.models.states.States`).
    """

    heads: Any
    mlps: Any
    has_output_bias: bool = True

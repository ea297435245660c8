"""What extraction finds and the submodel is built from: which components stay, and what the removed ones write."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Which components stay.

    Args:
        heads: bool ``[L, H]``.
        mlps: bool ``[L]``.
    """

    heads: np.ndarray
    mlps: np.ndarray


@dataclass(frozen=True)
class Constants:
    """What a removed component writes instead.

    Args:
        heads: ``[L, H, P, d_head]``, before the output projection; P = 1, or one vector per position.
        mlps: ``[L, P, d]``.
        has_output_bias: False when zero ablation removes 1/H of ``b_O`` with each head (bias convention ``split``).
    """

    heads: Tensor
    mlps: Tensor
    has_output_bias: bool

"""The correctness gate: a result is right when rounding alone explains how far it is from the truth."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_LAMBDA = 4.0


def sum_error(terms: int, dtype: torch.dtype) -> float:
    """What rounding does to a sum of ``terms`` products, relative to the sum of their absolute values.

    ``min(n, lambda sqrt(n)) u``: the worst case, or the probabilistic bound of Higham and Mary 2019 ("A new approach to
    probabilistic rounding error analysis"), which lambda = 4 makes all but certain. Half precisions sum in float32.
    """
    return min(terms, _LAMBDA * math.sqrt(terms)) * unit_roundoff(_wide(dtype))


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding once."""
    return torch.finfo(dtype).eps / 2


def problem(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor | float]],
    terms: int,
    dtype: torch.dtype,
    on_the_way: Tensor | float = 0.0,
) -> str | None:
    """What is wrong, in one line, or None.

    Args:
        pairs: a result, the truth, and what rounding errors are relative to: the sum of absolute values element by
            element, or the largest absolute value of the truth.
        terms: additions behind one number of the result.
        dtype: in which it was computed and rounded.
        on_the_way: a number that was rounded too before the result was made of it.
    """
    relative, once = sum_error(terms, dtype), unit_roundoff(dtype)
    for result, truth, scale in pairs:
        if result.shape != truth.shape:
            return f"the result has shape {list(result.shape)}, the truth {list(truth.shape)}"
        error = (result.to(truth) - truth).abs()
        allowed = once * (truth.abs() + torch.as_tensor(on_the_way).abs()) + relative * scale
        wrong = ~(error <= allowed)  # NaN is wrong
        if bool(wrong.any()):
            worst = float((error / allowed).nan_to_num(math.inf).max())
            count = f"{int(wrong.sum())} of {wrong.numel()}"
            return f"{count} numbers are off by up to {worst:.3g} times what rounding explains"
    return None


def model_terms(layers: int, width: int) -> int:
    """Additions behind a number that went through ``layers`` blocks: each adds sums of up to ``4 width`` products.

    Errors of one block are added to those of the next, so the bound grows linearly with layers and, within a block,
    as that of a sum: the number of terms that has this bound in :func:`sum_error`.
    """
    return layers**2 * 4 * width


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

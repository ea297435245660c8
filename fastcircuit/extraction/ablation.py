"""What a removed component writes instead: nothing, or its mean over the patching prompts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcircuit.circuit import OUTPUT_BIAS
from fastcircuit.errors import InputError
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Constants
from fastcircuit.tasks.task import Examples

ABLATIONS = ("mean", "mean-positional", "zero")
# Activations of the patching run that are alive at once.
CHUNK_BYTES = 2**28


def ablation_constants(
    model: MaskedCausalLM, patching: Examples, ablation: str = "mean", output_bias: str = "split"
) -> Constants:
    """The constants of ``ablation``, means taken from the unpruned model on the clean prompts of ``patching``.

    ``mean``: one vector per component, ``sum over real tokens of y / number of tokens``, valid at any length.
    ``mean-positional``: one vector per component and position, ``mean over prompts of y[position]``, as the paper's
    code does; all prompts must be equally long. ``zero``: zeros. Sums are accumulated in float64, chunk by chunk.

    Args:
        output_bias: under zero ablation, ``split`` (1/H of ``b_O`` goes with each head) or ``kept``.

    Returns:
        Heads ``[L, H, P, d_head]`` and MLPs ``[L, P, d]`` in the model's dtype; P is 1, or the length of the prompts.

    Raises:
        InputError: unknown ablation or convention, prompts of unequal length, activations that are not finite.

    Source: circuit extraction paper, section 3 and appendix C.
    """
    check_ablation(ablation)
    if output_bias not in OUTPUT_BIAS:
        raise InputError(f"output_bias is {output_bias!r}; accepted: {', '.join(OUTPUT_BIAS)}")
    if ablation == "zero":
        heads, mlps = (torch.zeros_like(part[:, :1]) for part in _activations(model, patching.select(slice(1))))
        return _constants(model, heads, mlps, has_output_bias=output_bias == "kept")
    positions = 1
    if ablation == "mean-positional":
        positions = equal_length([patching])
    heads, mlps = _means(model, patching, positions)
    for part in (heads, mlps):
        check_finite(model, part)
    return _constants(model, heads, mlps, has_output_bias=True)


def check_ablation(ablation: str) -> None:
    """InputError unless there is such an ablation."""
    if ablation not in ABLATIONS:
        raise InputError(f"ablation is {ablation!r}; accepted: {', '.join(ABLATIONS)}")


def equal_length(splits: list[Examples]) -> int:
    """The length of every prompt in ``splits``; InputError when they differ, as means per position are undefined."""
    lengths = torch.cat([examples.attention_mask.sum(1) for examples in splits])
    shortest, longest = (int(bound) for bound in lengths.aminmax())
    if shortest != longest:
        raise InputError(
            f"mean-positional ablation needs prompts of equal length; these have {shortest} to {longest} tokens: "
            "use mean, which pools over positions"
        )
    return longest


def check_finite(model: MaskedCausalLM, values: Tensor) -> None:
    """InputError when the model computed NaN or infinity, naming the parameter that is to blame if there is one."""
    if bool(values.isfinite().all()):
        return
    for name, parameter in model.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"the model's {name} holds NaN or infinity; load weights that are whole")
    raise InputError(f"the model computes NaN or infinity in {model.dtype} on this task; use a wider dtype")


def _means(model: MaskedCausalLM, patching: Examples, positions: int) -> tuple[Tensor, Tensor]:
    """Means ``[L, positions, H * d_head]`` and ``[L, positions, d]``; one position pools all tokens."""
    totals: list[Tensor] | None = None
    for chunk in _chunks(model, patching):
        parts = [part.unflatten(1, (-1, positions)).sum(1, dtype=torch.float64) for part in _activations(model, chunk)]
        totals = parts if totals is None else [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    assert totals is not None
    count = int(patching.attention_mask.sum()) / positions
    heads, mlps = ((total / count).to(model.dtype) for total in totals)
    return heads, mlps


@torch.no_grad()
def _activations(model: MaskedCausalLM, examples: Examples) -> tuple[Tensor, Tensor]:
    """What heads and MLPs compute on the real tokens of clean prompts: ``[L, T, H * d_head]`` and ``[L, T, d]``."""
    states, _, _ = model.run(examples.input_ids, examples.attention_mask)
    return states.heads, states.mlps


def _chunks(model: MaskedCausalLM, examples: Examples) -> Iterator[Examples]:
    """Consecutive examples whose activations take about CHUNK_BYTES."""
    numbers_per_token = model.graph.num_layers * 2 * model.config.hidden_size
    rows = CHUNK_BYTES // (numbers_per_token * model.dtype.itemsize * examples.input_ids.shape[1])
    for first in range(0, len(examples), max(1, rows)):
        yield examples.select(slice(first, first + max(1, rows)))


def _constants(model: MaskedCausalLM, heads: Tensor, mlps: Tensor, has_output_bias: bool) -> Constants:
    per_head = heads.unflatten(2, (model.graph.num_heads, -1)).transpose(1, 2).contiguous()
    return Constants(per_head, mlps, has_output_bias)

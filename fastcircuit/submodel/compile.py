"""compile_submodel: a model and what is kept of it, made into a smaller model that computes the same."""

import copy
from collections.abc import Sequence
from typing import Any

from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel import passes
from fastcircuit.submodel.assembly import assemble
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.submodel.lowering import lower
from fastcircuit.submodel.modeling_circuit import CircuitForCausalLM


def compile_submodel(
    model: Any,
    kept: Kept,
    constants: Constants,
    *,
    answer_tokens: Sequence[int] | None = None,
    last_position_only: bool = False,
    fold_norms: bool = True,
) -> CircuitForCausalLM:
    """The circuit as a model of its own: kept components with their weights, removed ones as constants.

    Its logits are those of the original model in which every removed head passes its constant to the output projection
    and every removed MLP writes its constant (circuit extraction, section 3), to rounding.

    Args:
        model: a GPT-2, Llama, Mistral or Qwen2 ``...ForCausalLM``, or the :class:`MaskedCausalLM` around it.
        kept: which components stay.
        constants: what the others write; with P > 1 rows the result takes inputs of at most P tokens.
        answer_tokens: give logits of these token ids only, in this order; such a model cannot ``generate``.
        last_position_only: give logits of the last position only, unless a call says otherwise.
        fold_norms: make the norms' weights part of the projections behind them. It changes nothing but
            rounding: False keeps the original weights bit by bit.

    Raises:
        InputError: an architecture that is not supported, shapes that are not the model's, values that are not finite,
            or answer tokens that are none.
    """
    source = model.model if isinstance(model, MaskedCausalLM) else model
    program = passes.merge_constants(passes.drop_empty_blocks(lower(source, kept, constants)))
    if answer_tokens is not None:
        program = passes.restrict_to_answers(program, answer_tokens)
    if fold_norms:
        program = passes.fold_norms(program)
    tokens = {name: getattr(source.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    submodel = assemble(program, last_position_only=last_position_only, source=describe_source(source, kept), **tokens)
    submodel.generation_config = copy.deepcopy(source.generation_config)
    return submodel


def describe_source(model: Any, kept: Kept) -> dict[str, Any]:
    """For the record in the config: where the circuit came from and which components it keeps, layer by layer."""
    return {
        "model": model.config.name_or_path or None,
        "architecture": model.config.model_type,
        "heads": [[int(head) for head in row.nonzero()[0]] for row in kept.heads],
        "mlps": [int(layer) for layer in kept.mlps.nonzero()[0]],
    }

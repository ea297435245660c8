"""From a :class:`Program` to the Hugging Face model that runs it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastcircuit.models.loading import quiet
from fastcircuit.submodel.configuration_circuit import CircuitConfig
from fastcircuit.submodel.modeling_circuit import CircuitForCausalLM
from fastcircuit.submodel.parts import Affine, AttentionPart, ConstantPart, Norm, Part, Program


def assemble(program: Program, **settings: Any) -> CircuitForCausalLM:
    """The model of a program, in eval mode, with weights of its own, in the dtype and on the device of the program's.

    Args:
        settings: further arguments of ``CircuitConfig``.
    """
    dtype, device = program.tokens.dtype, program.tokens.device
    weights = {name: value.to(dtype, copy=True).contiguous() for name, value in _weights(program)}
    config = _describe(program, settings)
    with quiet():
        model: Any = CircuitForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model.to(device).eval()


def _describe(program: Program, settings: dict[str, Any]) -> CircuitConfig:
    writers = [part for part in program.parts if not isinstance(part, ConstantPart)]
    lengths = [part.values.shape[0] for part in program.parts if isinstance(part, ConstantPart)]
    described = {**program.settings, **settings}
    if program.positions is not None:
        described["max_position_embeddings"] = program.positions.shape[0]
    return CircuitConfig(
        vocab_size=program.tokens.shape[0],
        hidden_size=program.tokens.shape[1],
        head_dim=program.head_dim,
        blocks=[[_describe_part(part, program.head_dim) for part in block] for block in program.blocks],
        block_norm_weights=any(part.norm.weight is not None for part in writers),
        final_norm_weights=program.final_norm.weight is not None,
        constant_positions=min((length for length in lengths if length > 1), default=None),
        answer_tokens=None if program.answer_tokens is None else list(program.answer_tokens),
        head_bias=program.head.bias is not None,
        tie_word_embeddings=program.tied,
        **described,
    )


def _describe_part(part: Part, head_dim: int) -> dict[str, Any]:
    if isinstance(part, ConstantPart):
        return {"kind": "constant", "positions": part.values.shape[0]}
    common = {"layer": part.layer, "output_bias": part.output.bias is not None}
    if isinstance(part, AttentionPart):
        heads, kv_heads = (affine.weight.shape[0] // head_dim for affine in (part.query, part.key))
        return {
            "kind": "attention",
            "heads": heads,
            "kv_heads": kv_heads,
            "scale": part.scale,
            "sliding": part.sliding,
            "input_bias": part.query.bias is not None,
            **common,
        }
    return {
        "kind": "mlp",
        "width": part.up.weight.shape[0],
        "gated": part.gate is not None,
        "input_bias": part.up.bias is not None,
        **common,
    }


def _weights(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its name."""
    yield "model.embed_tokens.weight", program.tokens
    if program.positions is not None:
        yield "model.embed_positions.weight", program.positions
    for index, block in enumerate(program.blocks):
        for place, part in enumerate(block):
            yield from _part_weights(f"model.layers.{index}.parts.{place}", part)
    yield from _named("model.norm", program.final_norm)
    yield from _named("lm_head", program.head)


def _part_weights(name: str, part: Part) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, ConstantPart):
        yield f"{name}.weight", part.values
        return
    yield from _named(f"{name}.norm", part.norm)
    if isinstance(part, AttentionPart):
        for letter, affine in zip("qkvo", (part.query, part.key, part.value, part.output), strict=True):
            yield from _named(f"{name}.{letter}_proj", affine)
    else:
        yield from _named(f"{name}.up_proj", part.up)
        yield from _named(f"{name}.down_proj", part.output)
        if part.gate is not None:
            yield from _named(f"{name}.gate_proj", part.gate)


def _named(name: str, holder: Affine | Norm) -> Iterator[tuple[str, Tensor]]:
    for what, value in (("weight", holder.weight), ("bias", holder.bias)):
        if value is not None:
            yield f"{name}.{what}", value

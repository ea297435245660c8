"""From a Hugging Face model and what is kept of it to a :class:`Program`: one part per kept or removed component."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.submodel.grouping import group_heads
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.submodel.parts import Affine, AttentionPart, ConstantPart, MlpPart, Norm, Part, Program, vector


@dataclass(frozen=True)
class Layer:
    """One whole layer of the original model."""

    attention: AttentionPart
    mlp: MlpPart


@dataclass(frozen=True)
class Source:
    """A whole original model in our terms.

    Args:
        heads, group: query heads per layer, and how many of them share a key/value head.
    """

    layers: tuple[Layer, ...]
    heads: int
    group: int
    head_dim: int
    tokens: Tensor
    positions: Tensor | None
    final_norm: Norm
    settings: dict[str, Any]


def lower(model: Any, kept: Kept, constants: Constants) -> Program:
    """The circuit as one block per layer: kept heads, the constant of the removed ones, the MLP or its constant.

    With ``has_output_bias`` False, a removed head takes its share ``b_O / H`` of the output bias along.

    Raises:
        InputError: an architecture that is not supported, or shapes that are not the model's.
    """
    check_lowers(model.config)
    source = SOURCES[model.config.model_type](model)
    head_values, mlp_values = _check_shapes(source, kept, constants)
    blocks: list[tuple[Part, ...]] = []
    for index, layer in enumerate(source.layers):
        attention = _attention_parts(source, layer.attention, kept.heads[index], head_values[index], constants)
        mlp: Part = layer.mlp if kept.mlps[index] else ConstantPart(mlp_values[index])
        blocks.append((*attention, mlp))
    head = model.get_output_embeddings()
    return Program(
        tokens=source.tokens,
        positions=source.positions,
        blocks=tuple(blocks),
        final_norm=source.final_norm,
        head=_linear(head),
        tied=head.weight.data_ptr() == source.tokens.data_ptr(),
        head_dim=source.head_dim,
        settings=source.settings,
    )


def check_lowers(config: Any) -> None:
    """InputError naming the supported architectures unless a submodel can be made of models of ``config``."""
    if config.model_type not in SOURCES:
        raise InputError(
            f"no submodel can be made of architecture {config.model_type!r}; supported: {', '.join(SOURCES)}"
        )


def _check_shapes(source: Source, kept: Kept, constants: Constants) -> tuple[Tensor, Tensor]:
    """The constants in float64, ``[L, H, P, d_head]`` and ``[L, P, d]``; InputError unless all shapes are right."""
    layers, size = len(source.layers), source.tokens.shape[1]
    heads, mlps = (
        torch.as_tensor(values).detach().to(source.tokens.device, torch.float64)
        for values in (constants.heads, constants.mlps)
    )
    for name, chosen in (("kept.heads", kept.heads), ("kept.mlps", kept.mlps)):
        if chosen.dtype != np.bool_:
            raise InputError(f"{name} has dtype {chosen.dtype}; it must be bool, True where a component stays")
    positions = heads.shape[2] if heads.dim() == 4 else 1
    for name, shape, expected in (
        ("kept.heads", kept.heads.shape, (layers, source.heads)),
        ("kept.mlps", kept.mlps.shape, (layers,)),
        ("constants.heads", heads.shape, (layers, source.heads, positions, source.head_dim)),
        ("constants.mlps", mlps.shape, (layers, positions, size)),
    ):
        if tuple(shape) != expected:
            raise InputError(f"{name} has shape {list(shape)}; this model needs {list(expected)}")
    for name, values in (("constants.heads", heads), ("constants.mlps", mlps)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name} holds NaN or infinity; compute it again from finite activations")
    return heads, mlps


def _attention_parts(
    source: Source, whole: AttentionPart, kept: Any, values: Tensor, constants: Constants
) -> tuple[Part, ...]:
    """The kept heads of one layer, if any, and the constant the removed ones write (``values`` ``[H, P, d_head]``)."""
    width = source.head_dim
    heads = [int(head) for head in kept.nonzero()[0]]
    removed = torch.as_tensor(~kept, device=values.device)
    # [d, H, d_head] x [H, P, d_head] -> [P, d]
    columns = whole.output.weight.unflatten(1, (source.heads, width))[:, removed].double()
    constant = torch.einsum("dhw,hpw->pd", columns, values[removed])
    bias = whole.output.bias
    if bias is not None and not constants.has_output_bias:
        bias = bias * (len(heads) / source.heads)
    if not heads:
        return (ConstantPart(constant if bias is None else constant + bias),)
    return _take_heads(whole, heads, source.group, width, bias), ConstantPart(constant)


def _take_heads(whole: AttentionPart, heads: list[int], group: int, width: int, bias: Tensor | None) -> AttentionPart:
    """Only these heads, re-grouped (see :func:`group_heads`)."""
    grouping = group_heads(heads, group)
    fill = torch.tensor([head is None for head in grouping.queries], device=whole.output.weight.device)
    fill = fill.repeat_interleave(width)
    rows, kv_rows = (
        _rows_of([0 if head is None else head for head in chosen], width, fill.device)
        for chosen in (grouping.queries, grouping.kv)
    )
    query, output = whole.query.rows(rows), whole.output.weight[:, rows]
    query.weight[fill] = 0
    output[:, fill] = 0
    return AttentionPart(
        layer=whole.layer,
        norm=whole.norm,
        query=query,
        key=whole.key.rows(kv_rows),
        value=whole.value.rows(kv_rows),
        output=Affine(output, bias),
        scale=whole.scale,
        sliding=whole.sliding,
    )


def _rows_of(heads: list[int], width: int, device: torch.device) -> Tensor:
    """Rows of the heads in a projection, ``[len(heads) * width]``."""
    starts = torch.tensor(heads, device=device)[:, None] * width
    return (starts + torch.arange(width, device=device)).flatten()


def _linear(layer: Any) -> Affine:
    return Affine(layer.weight.detach(), vector(layer.bias))


def _conv1d(layer: Any) -> Affine:
    """GPT-2 keeps its linear layers transposed."""
    return Affine(layer.weight.detach().T, vector(layer.bias))


def _gpt2(model: Any) -> Source:
    config, body = model.config, model.transformer
    if config.add_cross_attention:
        raise InputError("a GPT-2 with cross-attention is not supported; set add_cross_attention=False")

    def layer(index: int, block: Any) -> Layer:
        query, key, value = _conv1d(block.attn.c_attn).chunk(3)
        output, norm = _conv1d(block.attn.c_proj), _norm(block.ln_1)
        attention = AttentionPart(index, norm, query, key, value, output, block.attn.scaling)
        mlp = MlpPart(index, _norm(block.ln_2), None, _conv1d(block.mlp.c_fc), _conv1d(block.mlp.c_proj))
        return Layer(attention, mlp)

    return Source(
        layers=tuple(layer(index, block) for index, block in enumerate(body.h)),
        heads=config.n_head,
        group=1,
        head_dim=config.n_embd // config.n_head,
        tokens=body.wte.weight.detach(),
        positions=body.wpe.weight.detach(),
        final_norm=_norm(body.ln_f),
        settings={
            "norm": "layer_norm",
            "norm_eps": config.layer_norm_epsilon,
            "hidden_act": config.activation_function,
            "learned_positions": True,
            "max_position_embeddings": config.n_positions,
        },
    )


def _llama(model: Any) -> Source:
    """Llama, and what is built of the same parts: Mistral (sliding windows), Qwen2 (biases, windows in some layers)."""
    config, body = model.config, model.model
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)

    def layer(index: int, block: Any) -> Layer:
        attention = block.self_attn
        query, key, value, output = (
            _linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        sliding = window is not None and (kinds is None or kinds[index] == "sliding_attention")
        norm = _norm(block.input_layernorm)
        gate, up, down = (_linear(part) for part in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj))
        return Layer(
            AttentionPart(index, norm, query, key, value, output, attention.scaling, sliding),
            MlpPart(index, _norm(block.post_attention_layernorm), gate, up, down),
        )

    layers = tuple(layer(index, block) for index, block in enumerate(body.layers))
    return Source(
        layers=layers,
        heads=config.num_attention_heads,
        group=config.num_attention_heads // config.num_key_value_heads,
        head_dim=body.layers[0].self_attn.head_dim,
        tokens=body.embed_tokens.weight.detach(),
        positions=None,
        final_norm=_norm(body.norm),
        settings={
            "norm": "rms_norm",
            "norm_eps": config.rms_norm_eps,
            "hidden_act": config.hidden_act,
            "learned_positions": False,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": dict(config.rope_parameters),
            "sliding_window": window if any(layer.attention.sliding for layer in layers) else None,
        },
    )


def _norm(module: Any) -> Norm:
    return Norm(vector(module.weight), vector(getattr(module, "bias", None)))


SOURCES: dict[str, Callable[[Any], Source]] = {"gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama}

"""From what the ``tracr`` package compiles to a :class:`TracrLMHeadModel`, and the tokenizer that belongs to it.

assembled = tracr.compiler.compiling.compile_rasp_to_model(program, vocab={1, 2, 3}, max_seq_len=5)
model = from_assembled(assembled)          # a numerical program: from_assembled(assembled, answers=[0, 1 / 2, 1])
model.save_pretrained("compiled"), tokenizer_of(model.config).save_pretrained("compiled")
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fastcircuit.errors import InputError
from fastcircuit.models.modeling_tracr import NEVER, TracrConfig, TracrLMHeadModel


def from_assembled(assembled: Any, answers: Mapping[str, float] | Sequence[float] | None = None) -> TracrLMHeadModel:
    """The Hugging Face model of an ``AssembledTransformerModel``; weights unchanged, unembedding as in its file's top.

    Args:
        assembled: what ``compile_rasp_to_model`` returns.
        answers: of a numerical program, the numbers it can give (a mapping names their tokens, ``{"1/2": 0.5}``). The
            reading error is their mean distance.

    Raises:
        InputError: a model with LayerNorm or another activation than ReLU, a numerical program without ``answers``,
            tokens that look alike.
    """
    _check_supported(assembled)
    params = {name: {key: _tensor(value) for key, value in of.items()} for name, of in assembled.params.items()}
    inputs = assembled.input_encoder
    tokens = _by_id(inputs.encoding_map)
    categorical = getattr(assembled.output_encoder, "encoding_map", None)
    columns = _unembedding(assembled, params)
    if categorical is not None:
        names, values = _by_id(categorical), None
    else:
        named = _named_numbers(answers)
        names, values = list(named), list(named.values())
    vocabulary = tokens + [name for name in names if name not in tokens]
    shape = assembled.model_config
    config = TracrConfig(
        tokens=vocabulary,
        hidden_size=params["token_embed"]["embeddings"].shape[1],
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        head_dim=shape.key_size,
        intermediate_size=shape.mlp_hidden_size,
        max_position_embeddings=params["pos_embed"]["embeddings"].shape[0],
        causal=bool(shape.causal),
        answers=[vocabulary.index(name) for name in names],
        answer_values=values,
        noise=None if values is None else _mean_distance(values),
        bos_token_id=tokens.index(str(inputs.bos_token)),
        pad_token_id=tokens.index(str(inputs.pad_token)),
        dtype="float32",
    )
    model = TracrLMHeadModel(config)
    model.load_state_dict(_state(params, config, columns))
    return model.eval()


def tokenizer_of(config: TracrConfig) -> PreTrainedTokenizerFast:
    """One token per word, words between spaces; BOS comes first; a word that is no token is an error."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(config.tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, pad = config.tokens[config.bos_token_id], config.tokens[config.pad_token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config.bos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=pad,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _check_supported(assembled: Any) -> None:
    shape = assembled.model_config
    if shape.layer_norm:
        raise InputError("a Tracr model with layer_norm is not supported; compiled programs have none")
    if [float(shape.activation_function(x)) for x in (-1.0, 2.0)] != [0.0, 2.0]:
        raise InputError(
            "a Tracr model whose activation_function is not ReLU is not supported; compiled programs use it"
        )


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float32))


def _by_id(encoding: Mapping[Any, int]) -> list[str]:
    """The tokens of an encoder, as text, by their numbers."""
    values = sorted(encoding, key=lambda value: encoding[value])
    tokens = [str(value) for value in values]
    wrong = [token for token in tokens if tokens.count(token) > 1 or not token or token.split() != [token]]
    if wrong:
        raise InputError(f"token {wrong[0]!r} of the compiled program is empty, has a space, or is there twice as text")
    return tokens


def _unembedding(assembled: Any, params: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """What the compiled model multiplies its final stream with, ``[d, answers]``."""
    import haiku  # comes with tracr

    def unembed(stream: Any) -> Any:
        return assembled.get_compiled_model().unembed(stream, use_unembed_argmax=False)

    identity = np.eye(params["token_embed"]["embeddings"].shape[1], dtype=np.float32)
    columns = _tensor(haiku.without_apply_rng(haiku.transform(unembed)).apply(assembled.params, identity))
    return columns.reshape(len(identity), -1)


def _named_numbers(answers: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    """Token and number of every answer, smallest number first."""
    if answers is None:
        raise InputError("this program gives numbers; say which ones with answers, such as answers=[0, 0.5, 1]")
    named = answers if isinstance(answers, Mapping) else {f"{value:g}": value for value in answers}
    if len(named) < 2 or len(set(named.values())) != len(named):
        raise InputError(f"answers is {answers}; give at least two different numbers")
    return {name: float(value) for name, value in sorted(named.items(), key=lambda item: item[1])}


def _mean_distance(values: Sequence[float]) -> float:
    return (values[-1] - values[0]) / (len(values) - 1)


def _state(params: Mapping[str, Mapping[str, Tensor]], config: TracrConfig, columns: Tensor) -> dict[str, Tensor]:
    """The compiled weights under the model's names."""
    embeddings = params["token_embed"]["embeddings"]
    state = {
        "tok_embed.weight": nn.functional.pad(embeddings, (0, 0, 0, config.vocab_size - len(embeddings))),
        "pos_embed.weight": params["pos_embed"]["embeddings"],
    }
    names = {
        "attention.query": "attn/query",
        "attention.key": "attn/key",
        "attention.value": "attn/value",
        "attention.output": "attn/linear",
        "mlp.up": "mlp/linear_1",
        "mlp.down": "mlp/linear_2",
    }
    for layer in range(config.num_hidden_layers):
        for own, theirs in names.items():
            linear = params[f"transformer/layer_{layer}/{theirs}"]
            state[f"blocks.{layer}.{own}.weight"] = linear["w"].T.contiguous()
            state[f"blocks.{layer}.{own}.bias"] = linear["b"]
    state["lm_head.weight"], state["lm_head.bias"] = _lm_head(config, columns)
    return state


def _lm_head(config: TracrConfig, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``[V, d]`` and bias ``[V]``: the compiled unembedding, or the reading of a number."""
    weight = torch.zeros(config.vocab_size, len(columns))
    bias = torch.full((config.vocab_size,), NEVER)
    answers = torch.tensor(config.answers)
    if config.answer_values is None:
        weight[answers], bias[answers] = columns.T, 0.0
    else:
        assert config.noise is not None
        values = torch.tensor(config.answer_values)[:, None] / config.noise**2
        weight[answers] = values * columns.T
        bias[answers] = -(values.squeeze(1) * torch.tensor(config.answer_values)) / 2
    return weight, bias

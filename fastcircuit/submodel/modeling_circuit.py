"""An extracted circuit as a Hugging Face model. Stands alone: it is saved beside the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, repeat_kv, rotate_half
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_circuit import CircuitConfig

Keep = int | Tensor
# What Hugging Face calls the cache, in arguments and in outputs: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
_CAN_ATTEND_FROM_FEW = ("eager", "sdpa")


def keep_positions(x: Tensor, keep: Keep, dim: int = 1) -> Tensor:
    """The last ``keep`` positions of dimension ``dim`` (0: all), or those listed in a 1-dimensional tensor."""
    if isinstance(keep, Tensor):
        return x.index_select(dim, keep)
    return x.narrow(dim, max(x.shape[dim] - keep, 0), min(keep, x.shape[dim])) if keep else x


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: ``softmax(q k^T scaling + mask) v``, the softmax in float32 or better.

    Args:
        query: ``[B, H, Q, d_head]``; key, value: ``[B, KV, K, d_head]``; attention_mask: added, ``[B, 1, Q, K]``.

    Returns:
        ``[B, Q, H, d_head]`` and the weights ``[B, H, Q, K]``.
    """
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def make_norm(config: CircuitConfig, with_weights: bool) -> nn.Module:
    """The model's kind of norm over the stream, with or without weights of its own."""
    kind = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.norm]
    return kind(config.hidden_size, eps=config.norm_eps, elementwise_affine=with_weights)


class CircuitAttention(nn.Module):
    """The kept heads of one layer: norm, attention, output projection. Returns what they add to the stream."""

    def __init__(self, config: CircuitConfig, part: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        heads, kv_heads, width = part["heads"], part["kv_heads"], config.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width
        self.num_key_value_groups = heads // kv_heads
        self.scaling = part["scale"]
        self.sliding_window = config.sliding_window if part["sliding"] else None
        self.is_causal = True
        self.norm = make_norm(config, config.block_norm_weights)
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=part["input_bias"])
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=part["input_bias"])
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=part["input_bias"])
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=part["output_bias"])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        keep: Keep = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads write at the positions ``keep``, ``[B, K, d]``, and the attention weights if there are any."""
        normed = self.norm(hidden_states)
        key = self._rotate(self._heads(self.k_proj(normed)), position_embeddings)
        value = self._heads(self.v_proj(normed))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        early = self._can_keep_early(attention_mask, keep, normed.shape[1], key.shape[2])
        if early:
            normed = keep_positions(normed, keep)
            if position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = keep_positions(cos, keep), keep_positions(sin, keep)
            if attention_mask is not None:
                attention_mask = keep_positions(attention_mask, keep, dim=2)
        query = self._rotate(self._heads(self.q_proj(normed)), position_embeddings)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attended = attended.reshape(*normed.shape[:2], -1)
        return self.o_proj(attended if early else keep_positions(attended, keep)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        if position_embeddings is None:
            return x
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        return x * cos + rotate_half(x) * sin

    def _can_keep_early(self, attention_mask: Any, keep: Keep, queries: int, keys: int) -> bool:
        """Whether the queries that are not kept may be left out before the attention.

        A mask of ours is cut with the queries. Without a mask the attention functions assume queries and keys that end
        together, and only a single query, which sees all keys, means the same to all of them.
        """
        if self.config._attn_implementation not in _CAN_ATTEND_FROM_FEW or (isinstance(keep, int) and not keep):
            return False
        if attention_mask is not None:
            return isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        return isinstance(keep, int) and keep == 1 and queries == keys


class CircuitMLP(nn.Module):
    """One MLP with the norm in front of it. Returns what it adds to the stream."""

    def __init__(self, config: CircuitConfig, part: dict[str, Any]) -> None:
        super().__init__()
        width, bias = part["width"], part["input_bias"]
        self.norm = make_norm(config, config.block_norm_weights)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias) if part["gated"] else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=part["output_bias"])
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        up = self.up_proj(normed)
        return self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(normed)) * up)


class CircuitConstant(nn.Module):
    """What removed components write: one vector ``[1, d]``, or one per position ``[P, d]``."""

    def __init__(self, config: CircuitConfig, part: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(part["positions"], config.hidden_size))

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.weight if self.weight.shape[0] == 1 else nn.functional.embedding(position_ids, self.weight)


class CircuitBlock(nn.Module):
    """Parts that write to the stream one after the other, one of them attention.

    A block without attention (a circuit in which no head is left has one) stores one number per token in the cache, so
    that the cache still knows how many tokens it has seen.
    """

    def __init__(self, config: CircuitConfig, layer_idx: int) -> None:
        super().__init__()
        kinds = {
            "attention": lambda part: CircuitAttention(config, part, layer_idx),
            "mlp": lambda part: CircuitMLP(config, part),
            "constant": lambda part: CircuitConstant(config, part),
        }
        parts = config.blocks[layer_idx]
        self.layer_idx = layer_idx
        self.parts = nn.ModuleList([kinds[part["kind"]](part) for part in parts])
        self.has_attention = any(part["kind"] == "attention" for part in parts)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        keep: Keep = 0,
        **kwargs: Any,
    ) -> Tensor:
        """The stream after this block, ``[B, K, d]``, at the positions ``keep``."""
        if not self.has_attention:
            self._count_tokens(hidden_states, cache)
            hidden_states, position_ids = keep_positions(hidden_states, keep), keep_positions(position_ids, keep)
        for part in self.parts:
            if isinstance(part, CircuitAttention):
                written, _ = part(hidden_states, attention_mask, position_embeddings, cache, keep=keep, **kwargs)
                hidden_states, position_ids = keep_positions(hidden_states, keep), keep_positions(position_ids, keep)
            else:
                written = part(position_ids if isinstance(part, CircuitConstant) else hidden_states)
            hidden_states = hidden_states + written
        return hidden_states

    def _count_tokens(self, hidden_states: Tensor, cache: Cache | None) -> None:
        if cache is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)


class CircuitPreTrainedModel(PreTrainedModel):
    config_class = CircuitConfig
    base_model_prefix = "model"
    _no_split_modules = ["CircuitBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = False
    _can_record_outputs = {"hidden_states": CircuitBlock, "attentions": CircuitAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CircuitConstant):
            init.zeros_(module.weight)


class CircuitModel(CircuitPreTrainedModel):
    """Embeddings, blocks and final norm of an extracted circuit."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        )
        self.rotary_emb = None if config.learned_positions else LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([CircuitBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.final_norm_weights)
        limits = [config.constant_positions, config.max_position_embeddings if config.learned_positions else None]
        self.longest_input = min((limit for limit in limits if limit is not None), default=None)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Keep = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The normed final stream.

        Args:
            input_ids: ``[B, S]`` (or ``inputs_embeds`` ``[B, S, d]``).
            attention_mask: ``[B, past + S]``, nonzero at real tokens.
            position_ids: ``[B, S]``; by default they count real tokens, so padding changes nothing.
            logits_to_keep: positions to compute to the end (see :func:`keep_positions`): in the last block only they
                ask, and what comes after it sees only them.
            cache: keys and values of earlier tokens; ``past_key_values`` is its name before transformers 5.24.

        Raises:
            ValueError: an input longer than the model's positions, or not exactly one kind of input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _count_positions(hidden_states, attention_mask, cache)
        self._check_length(position_ids)

        masks = self._masks(hidden_states, attention_mask, cache, position_ids)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        last = len(self.layers) - 1
        for index, (block, layer_type) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            hidden_states = block(
                hidden_states,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                cache=cache,
                keep=logits_to_keep if index == last else 0,
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **kept)

    def _masks(
        self, hidden_states: Tensor, attention_mask: Any, cache: Cache | None, position_ids: Tensor
    ) -> dict[str, Any]:
        """One attention mask for each kind of layer there is; ``generate`` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            layer_type: _MASKS[layer_type](
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
            for layer_type in dict.fromkeys(self.config.layer_types)
        }

    def _check_length(self, position_ids: Tensor) -> None:
        """ValueError for a position that is not known. In a compiled graph the table look-up itself checks."""
        if self.longest_input is None or torch.compiler.is_compiling():
            return
        tokens = int(position_ids.max()) + 1
        if tokens > self.longest_input:
            raise ValueError(f"the input has {tokens} tokens; this circuit takes at most {self.longest_input}")


def _count_positions(hidden_states: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
    """Positions of the new tokens, ``[B or 1, S]``, counted from each row's first real token."""
    tokens = hidden_states.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(tokens, device=hidden_states.device) + past).unsqueeze(0)


class CircuitForCausalLM(CircuitPreTrainedModel, GenerationMixin):
    """An extracted circuit with its unembedding, over the vocabulary or over the answer tokens of one task."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CircuitConfig) -> None:
        super().__init__(config)
        self.model = CircuitModel(config)
        outputs = config.vocab_size if config.answer_tokens is None else len(config.answer_tokens)
        self.lm_head = nn.Linear(config.hidden_size, outputs, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Keep | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of an extracted circuit, ``[B, K, V]``; with ``config.answer_tokens``, ``[B, K, A]``.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: as in
                :meth:`CircuitModel.forward`.
            labels: ``[B, S]``, for the loss; logits of all positions of the whole vocabulary are needed.
            logits_to_keep: the last so many positions (0: all), or a 1-dimensional tensor of positions; by default all
                of them, and the last one with ``config.last_position_only``.
        """
        if logits_to_keep is None:
            logits_to_keep = 1 if self.config.last_position_only and labels is None else 0
        if labels is not None and self.config.answer_tokens is not None:
            raise ValueError("a circuit that only has the logits of its answer tokens has no loss over labels")
        every_layer = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=0 if every_layer else logits_to_keep,
            **kwargs,
        )
        stream = outputs.last_hidden_state
        logits = self.lm_head(keep_positions(stream, logits_to_keep) if every_layer else stream)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **kept
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face ``generate``; ValueError for a circuit that has the logits of its answer tokens only."""
        if self.config.answer_tokens is not None:
            raise ValueError(
                "this circuit only has the logits of its answer tokens and cannot generate text: read "
                "config.answer_tokens[logits.argmax(-1)], or extract it with the whole vocabulary"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]


CircuitModel.register_for_auto_class("AutoModel")
CircuitForCausalLM.register_for_auto_class("AutoModelForCausalLM")

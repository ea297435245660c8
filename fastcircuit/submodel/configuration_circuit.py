"""Configuration of an extracted circuit. Stands alone: it is saved beside the weights, for use without fastcircuit."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class CircuitConfig(PreTrainedConfig):
    """A decoder whose blocks differ: each is a sequence of attention, MLPs and constants that add to the stream.

    Args:
        blocks: one list of parts per block, in the order in which they write. A part is one of

            - ``{"kind": "attention", "layer", "heads", "kv_heads", "scale", "sliding", "input_bias", "output_bias"}``;
              ``sliding``: only the last ``sliding_window`` tokens are seen;
            - ``{"kind": "mlp", "layer", "width", "gated", "input_bias", "output_bias"}``;
            - ``{"kind": "constant", "positions"}``: a vector that is added to the stream, one per position or
              (``positions`` 1) the same everywhere.

            ``layer`` is the layer of the original model, for the record.
        head_dim: width of a head.
        norm: ``layer_norm`` or ``rms_norm``, with ``norm_eps``.
        block_norm_weights, final_norm_weights: False where the norm's weights are folded into the projections behind.
        learned_positions: whether positions are a table (GPT-2); otherwise they are rotary (``rope_parameters``).
        constant_positions: inputs may not be longer than this many tokens, because some constant is known only for so
            many positions; None: no such limit.
        answer_tokens: when given, logits are over these token ids only, in this order.
        last_position_only: whether logits are of the last position unless ``logits_to_keep`` says otherwise.
        head_bias: whether the unembedding has a bias (a folded LayerNorm leaves one).
        source: name, kept components and ablation of the extraction this model came from, for the record.
    """

    model_type = "fastcircuit"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 16,
        head_dim: int = 8,
        blocks: list[list[dict[str, Any]]] | None = None,
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        block_norm_weights: bool = True,
        final_norm_weights: bool = True,
        hidden_act: str = "gelu_new",
        learned_positions: bool = True,
        max_position_embeddings: int = 1024,
        rope_parameters: dict[str, Any] | None = None,
        sliding_window: int | None = None,
        constant_positions: int | None = None,
        answer_tokens: list[int] | None = None,
        last_position_only: bool = False,
        head_bias: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.blocks = [[]] if blocks is None else blocks
        self.norm = norm
        self.norm_eps = norm_eps
        self.block_norm_weights = block_norm_weights
        self.final_norm_weights = final_norm_weights
        self.hidden_act = hidden_act
        self.learned_positions = learned_positions
        self.max_position_embeddings = max_position_embeddings
        if rope_parameters is not None:  # an attribute that is None would be filled with default rotary positions
            self.rope_parameters = rope_parameters
        self.sliding_window = sliding_window
        self.constant_positions = constant_positions
        self.answer_tokens = answer_tokens
        self.last_position_only = last_position_only
        self.head_bias = head_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.source = source
        self._describe_layers()
        super().__init__(**kwargs)

    def _describe_layers(self) -> None:
        """What caches and serving engines ask for, from the blocks."""
        attentions = [part for block in self.blocks for part in block if part["kind"] == "attention"]
        self.num_hidden_layers = len(self.blocks)
        self.num_attention_heads = max((part["heads"] for part in attentions), default=1)
        self.num_key_value_heads = max((part["kv_heads"] for part in attentions), default=1)
        self.intermediate_size = max(
            (part["width"] for block in self.blocks for part in block if part["kind"] == "mlp"), default=0
        )
        self.layer_types = [
            "sliding_attention" if any(part.get("sliding") for part in block) else "full_attention"
            for block in self.blocks
        ]


CircuitConfig.register_for_auto_class()

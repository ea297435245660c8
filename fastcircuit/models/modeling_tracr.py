"""Transformers compiled by Tracr (Lindner et al. 2023) as Hugging Face models: no norm, attention in both directions.

A compiled program answers at every position. A categorical answer is one of some tokens, and the compiled unembedding
gives their logits. A numerical answer is one number x, read from one direction of the stream. It becomes a distribution
over the numbers g_v that the program can give, as if x had been read with a Gaussian error of deviation ``noise``:

    ln P(v) = -(x - g_v)^2 / (2 noise^2) + constant        so        logit_v = (x g_v - g_v^2 / 2) / noise^2

which is an affine unembedding; the most likely token is the nearest number. So both kinds have logits over a
vocabulary, and every metric of a language model means what it says. Input tokens and answers share that vocabulary; a
token that is no answer has the logit ``NEVER``, a token that is no input an embedding of 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

NEVER = -100.0


class TracrConfig(PreTrainedConfig):
    """Shape of a compiled model.

    Args:
        tokens: the vocabulary; token i is ``tokens[i]``.
        head_dim: width of queries, keys and values.
        intermediate_size: hidden units of an MLP (ReLU).
        max_position_embeddings: longest input, the BOS token counted in.
        causal: whether a token sees only itself and what comes before.
        answers: ids of the tokens the program can answer with.
        answer_values: of a numerical program, the number each of ``answers`` stands for; None: a categorical one.
        noise: of a numerical program, the deviation of the reading error.
    """

    model_type = "tracr"

    def __init__(
        self,
        tokens: list[str] | None = None,
        hidden_size: int = 1,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        head_dim: int = 1,
        intermediate_size: int = 1,
        max_position_embeddings: int = 1,
        causal: bool = False,
        answers: list[int] | None = None,
        answer_values: list[float] | None = None,
        noise: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens = list(tokens or [])
        self.vocab_size = len(self.tokens)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.causal = causal
        self.answers = answers
        self.answer_values = answer_values
        self.noise = noise
        super().__init__(**{"tie_word_embeddings": False, "use_cache": False, **kwargs, "vocab_size": self.vocab_size})


class TracrAttention(nn.Module):
    """Softmax attention of every token to every real token (with ``causal``, to the earlier ones)."""

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        self.heads, self.scale = config.num_attention_heads, config.head_dim**-0.5
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, width) for _ in range(3))
        self.output = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``[B, S, d] -> [B, S, d]``; ``seen`` bool ``[B, 1, S, S]``: which key (last axis) a query sees."""
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(2, 3) * self.scale).masked_fill(~seen, -torch.inf)
        out: Tensor = self.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return out


class TracrMLP(nn.Module):
    """``W_2 relu(W_1 x + b_1) + b_2``."""

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class TracrBlock(nn.Module):
    """Attention, then an MLP; each adds what it computes."""

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.attention, self.mlp = TracrAttention(config), TracrMLP(config)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(x, seen)
        out: Tensor = x + self.mlp(x)
        return out


class TracrLMHeadModel(PreTrainedModel):
    """A compiled program with logits at every position (see the top of this file for what they are)."""

    config_class = TracrConfig
    config: TracrConfig

    def __init__(self, config: TracrConfig) -> None:
        super().__init__(config)
        self.tok_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(TracrBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Logits ``[B, S, V]`` of token ids ``[B, S]``; ``attention_mask`` ``[B, S]`` is 0 at padding."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        positions = (real.cumsum(1) - 1).clamp(min=0)
        x = self.tok_embed(input_ids) + self.pos_embed(positions)
        seen = real.bool()[:, None, None, :]
        if self.config.causal:
            seen = seen & torch.ones_like(seen[0, 0, 0]).expand(x.shape[1], -1).tril()
        # Padding on the left sees nothing real; let every token see itself, so that nothing is NaN.
        seen = seen | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, seen)
        return CausalLMOutput(logits=self.lm_head(x))


AutoConfig.register(TracrConfig.model_type, TracrConfig, exist_ok=True)
AutoModelForCausalLM.register(TracrConfig, TracrLMHeadModel, exist_ok=True)

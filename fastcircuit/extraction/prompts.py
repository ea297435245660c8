"""Examples laid out for pruned runs: packed tokens, and the rows among them that a block has to compute."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.tasks.task import Examples

# Packed tokens of one chunk of examples, by kind of device: enough to keep it busy.
CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}
# Logits that are alive at once.
LOGIT_BYTES = 2**27


class Rows:
    """Some packed tokens of every prompt: those a block computes, laid out ``[B, Q]`` for attention.

    Args:
        tokens: packed tokens, ascending, at least one of every prompt, ``[n]``; None: all.
    """

    def __init__(self, packing: Packing, rotary: tuple[Tensor, Tensor] | None, tokens: Tensor | None) -> None:
        self.packing = packing
        self.tokens = packing.select(None) if tokens is None else tokens
        self.positions = packing.position_ids[self.tokens]
        self.rotary = None if rotary is None else (rotary[0][self.tokens], rotary[1][self.tokens])
        prompt = torch.repeat_interleave(torch.arange(packing.shape[0], device=packing.device), packing.lengths)
        prompt = prompt[self.tokens]
        counts = torch.bincount(prompt, minlength=packing.shape[0])
        first = counts.cumsum(0) - counts
        slots = torch.arange(int(counts.max()), device=packing.device)
        # A prompt with fewer rows than the others repeats its last one.
        self._pad = first[:, None] + torch.minimum(slots, counts[:, None] - 1)  # [B, Q]
        self._place = prompt * len(slots) + torch.arange(len(self), device=packing.device) - first[prompt]  # [n]

    def __len__(self) -> int:
        return len(self.tokens)

    def narrow(self, stream: Tensor, rows: "Rows") -> Tensor:
        """These rows of a stream ``[C, len(rows), d]`` that holds ``rows``: all tokens, or these."""
        return stream if rows is self else stream.index_select(1, self.tokens)

    def to_sequences(self, heads: Tensor) -> Tensor:
        """``[H, n, d_head] -> [B, H, Q, d_head]``."""
        return heads.index_select(1, self._pad.flatten()).unflatten(1, self._pad.shape).transpose(0, 1)

    def to_rows(self, sequences: Tensor) -> Tensor:
        """``[B, H, Q, d_head] -> [n, H, d_head]``."""
        return sequences.transpose(1, 2).flatten(0, 1).index_select(0, self._place)

    def visible(self, causal: bool, window: int | None) -> Tensor:
        """Which keys each of these rows sees, bool ``[B, 1, Q, longest]``."""
        keys = torch.arange(self.packing.longest, device=self.packing.device)
        distance = self.positions[self._pad][:, :, None] - keys
        seen = distance >= 0 if causal else (keys < self.packing.lengths[:, None])[:, None].expand_as(distance)
        if window is not None:
            seen = seen & (distance.abs() < window)
        return seen[:, None]


class Prompts:
    """A chunk of examples of B prompts, T real tokens and N answer positions, and the original model's answers.

    Args:
        share: weight of one example in the mean over all examples; every one of its answers weighs alike.
    """

    def __init__(self, model: MaskedCausalLM, examples: Examples, share: float) -> None:
        self.model = model
        self.packing = Packing(examples.input_ids.shape, examples.attention_mask, model.device)
        self.token_ids = self.packing.pack(examples.input_ids.to(model.device))
        rotary = model.anatomy.rotary
        tables = None if rotary is None else rotary(self.packing.position_ids)
        self.every = Rows(self.packing, tables, None)
        self.answers = Rows(self.packing, tables, self.packing.select(examples.answer_mask))
        counts = examples.answer_mask.sum(1)
        self.weights = (share / counts.double()).repeat_interleave(counts).to(model.device)
        self.log_probs: Tensor | None = None
        self.probs: Tensor | None = None

    def embed(self) -> Tensor:
        """The input of the first block, ``[T, d]``."""
        return torch.stack(self.model.anatomy.embed(self.token_ids, self.packing.position_ids)).sum(0)

    def predict(self, read: Tensor) -> Tensor:
        """Log-probabilities ``[C, N, V]``, in float32 or better, of C final streams at the answers, ``[C, N, d]``."""
        logits = self.model.unembed(read.flatten(0, 1)).unflatten(0, read.shape[:2])
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)

    def divergences(self, read: Tensor) -> Tensor:
        """This chunk's part of the mean ``KL(original || pruned)`` of C pruned models, float64 ``[C]``."""
        rows = max(1, LOGIT_BYTES // (4 * self.model.config.vocab_size))
        totals = read.new_zeros(len(read), dtype=torch.float64)
        for first in range(0, len(self.answers), rows):
            part = slice(first, first + rows)
            some = max(1, rows // len(self.weights[part]))
            for start in range(0, len(read), some):
                which = slice(start, start + some)
                totals[which] += self._divergence(read[which, part], part)
        return totals

    def _divergence(self, read: Tensor, part: slice) -> Tensor:
        """``sum_v p_v (ln p_v - ln q_v)``, with p kept and the difference in place: half the time of ``kl_div``."""
        assert self.log_probs is not None
        assert self.probs is not None
        shift = self.predict(read).sub_(self.log_probs[part])
        return -torch.einsum("nv,cnv->cn", self.probs[part], shift).double() @ self.weights[part]


def chunked(model: MaskedCausalLM, examples: Examples) -> Iterator[Prompts]:
    """All of ``examples`` as chunks of about CHUNK_TOKENS tokens."""
    most = CHUNK_TOKENS.get(model.device.type, CHUNK_TOKENS["cpu"])
    first = tokens = 0
    lengths = examples.attention_mask.sum(1).tolist()
    for index, length in enumerate([*lengths, most + 1]):
        if tokens and tokens + length > most:
            yield Prompts(model, examples.select(slice(first, index)), 1 / len(examples))
            first, tokens = index, 0
        tokens += length

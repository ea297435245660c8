"""What does not depend on the masks: the full model's answer distributions and the ablated activations.

Both are computed once per example and kept, up to a budget of bytes; examples beyond it are computed when asked for.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.circuit import ABLATIONS, Ablation
from fastcircuit.errors import InputError
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States
from fastcircuit.tasks.task import Examples

OUTPUT_BIAS = ("split", "kept")
CHUNK_TOKENS = 4096
DEFAULT_BUDGET = 4 * 2**30


@dataclass(frozen=True)
class Answers:
    """The N answer positions of a batch.

    Args:
        tokens: packed tokens whose logits predict the answers, ``[N]``.
        example: row of the batch each belongs to, ``[N]``.
        right, wrong: the answer and the distractor token, ``[N]``; -100 where there is none.
        log_probs: the full model's log-probabilities, ``[N, V]``, or over the task's answer tokens, ``[N, A]``; empty
            in a bare batch.
    """

    tokens: Tensor
    example: Tensor
    right: Tensor
    wrong: Tensor
    log_probs: Tensor

    def example_mean(self, values: Tensor, num_examples: int) -> Tensor:
        """Mean over each example's answer positions, then over examples: scalar from ``[N]``."""
        counts = torch.bincount(self.example, minlength=num_examples)
        return (values / counts[self.example]).sum() / num_examples

    def example_total(self, values: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
        """Sum over examples of the mean over each one's positions that are not NaN, and how many examples have any."""
        known = ~values.isnan()
        counts = torch.bincount(self.example[known], minlength=num_examples)
        return (values[known] / counts[self.example[known]]).sum(), (counts > 0).sum()


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for a masked run: packed clean tokens, ablated states, reference answers."""

    size: int
    token_ids: Tensor
    packing: Packing
    ablated: States
    answers: Answers


class Reference:
    """Answer distributions and ablated states of ``examples`` under ``model``.

    Args:
        ablation: ``interchange`` (the corrupted run), ``mean`` (of ``patching``) or ``zero``.
        output_bias: under zero ablation, ``split`` (1/H of b_O goes with each head) or ``kept``.
        answer_tokens: restrict distributions to these tokens; None: the full vocabulary.
        patching: examples whose corrupted prompts give the means; None: ``examples`` themselves.
        budget: bytes of states and distributions to keep on the model's device.
    """

    def __init__(
        self,
        model: MaskedCausalLM,
        examples: Examples,
        ablation: Ablation = "interchange",
        output_bias: str = "split",
        answer_tokens: tuple[int, ...] | None = None,
        patching: Examples | None = None,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        if ablation not in ABLATIONS:
            raise InputError(f"ablation is {ablation!r}; accepted: {', '.join(ABLATIONS)}")
        if output_bias not in OUTPUT_BIAS:
            raise InputError(f"output_bias is {output_bias!r}; accepted: {', '.join(OUTPUT_BIAS)}")
        self.model = model
        self.examples = examples
        self.interchange = ablation == "interchange"
        self.answer_tokens = None if answer_tokens is None else torch.tensor(answer_tokens, device=model.device)
        self.constant = (
            None if self.interchange else _constant_states(model, patching or examples, ablation, output_bias)
        )
        self.lengths = examples.attention_mask.sum(1)
        self.counts = examples.answer_mask.sum(1)
        self._keep_what_fits(budget)

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, most: int) -> "Reference":
        """The same on the first ``most`` examples; what is kept is shared."""
        if most >= len(self):
            return self
        part = copy.copy(self)
        part.examples = self.examples.select(torch.arange(most))
        part.lengths, part.counts = self.lengths[:most], self.counts[:most]
        return part

    def batch(self, indices: Tensor) -> Batch:
        """The examples ``indices`` ``[B]``, from the cache where they are in it."""
        examples = self.examples.select(indices)
        packing = Packing(examples.input_ids.shape, examples.attention_mask, self.model.device)
        token_ids = packing.pack(examples.input_ids.to(self.model.device))
        if bool((indices < self.num_kept).all()):
            ablated, log_probs = self._kept(indices)
        else:
            ablated, log_probs = self._compute(examples)
        return Batch(len(examples), token_ids, packing, ablated, self._answers(examples, packing, log_probs))

    def bare_batch(self, indices: Tensor) -> Batch:
        """The examples ``indices`` without the full model's answers: for a caller that runs the full model itself."""
        examples = self.examples.select(indices)
        packing = Packing(examples.input_ids.shape, examples.attention_mask, self.model.device)
        token_ids = packing.pack(examples.input_ids.to(self.model.device))
        nothing = torch.empty(0, device=self.model.device)
        return Batch(
            len(examples), token_ids, packing, self._ablated(examples), self._answers(examples, packing, nothing)
        )

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, ``size`` at a time."""
        for chunk in torch.arange(len(self)).split(size):
            yield self.batch(chunk)

    def restrict(self, logits: Tensor) -> Tensor:
        """Log-probabilities over the vocabulary or the answer tokens, float32 or better: ``[N, V] -> [N, V or A]``."""
        if self.answer_tokens is not None:
            logits = logits.index_select(1, self.answer_tokens)
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return torch.log_softmax(wide, dim=-1)

    def _answers(self, examples: Examples, packing: Packing, log_probs: Tensor) -> Answers:
        mask, device = examples.answer_mask, self.model.device
        return Answers(
            tokens=packing.select(mask),
            example=mask.nonzero()[:, 0].to(device),
            right=examples.answers[mask].to(device),
            wrong=examples.distractors[mask].to(device),
            log_probs=log_probs,
        )

    def _compute(self, examples: Examples) -> tuple[States, Tensor]:
        """Ablated states over the packed tokens of ``examples``, and log-probabilities at their answers."""
        model = self.model
        _, stream, packing = model.run(examples.input_ids, examples.attention_mask)
        log_probs = self.restrict(model.unembed(stream.index_select(0, packing.select(examples.answer_mask))))
        return self._ablated(examples), log_probs

    def _ablated(self, examples: Examples) -> States:
        """What a removed edge carries, over the packed tokens of ``examples``."""
        if self.constant is not None:
            return self.constant
        return self.model.run(examples.corrupted_input_ids, examples.attention_mask)[0]

    @torch.no_grad()
    def _keep_what_fits(self, budget: int) -> None:
        """Fill the cache, chunk by chunk, with the first examples, until the next chunk would not fit."""
        states: list[States] = []
        log_probs: list[Tensor] = []
        self.num_kept = used = 0
        for first, last in token_chunks(self.lengths, CHUNK_TOKENS) if budget > 0 else ():
            ablated, answers = self._compute(self.examples.select(torch.arange(first, last)))
            used += _bytes(answers) + (_states_bytes(ablated) if self.interchange else 0)
            if used > budget:
                break
            states.append(ablated)
            log_probs.append(answers)
            self.num_kept = last
        self._log_probs = torch.cat(log_probs) if log_probs else None
        self._states = States.concatenate(states) if states and self.interchange else None
        self._first_token = torch.cumsum(self.lengths, 0) - self.lengths
        self._first_answer = torch.cumsum(self.counts, 0) - self.counts

    def _kept(self, indices: Tensor) -> tuple[States, Tensor]:
        device = self.model.device
        answers = _ranges(self._first_answer[indices], self.counts[indices]).to(device)
        assert self._log_probs is not None
        log_probs = self._log_probs.index_select(0, answers)
        if self.constant is not None:
            return self.constant, log_probs
        assert self._states is not None
        return self._states.take(_ranges(self._first_token[indices], self.lengths[indices]).to(device)), log_probs


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``start, start + 1, ..., start + length - 1`` for each pair, one after the other."""
    offsets = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.repeat_interleave(starts, lengths) + offsets


def token_chunks(lengths: Tensor, most: int = CHUNK_TOKENS) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of examples with at most ``most`` tokens each (or one example)."""
    first = tokens = 0
    for index, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > most:
            yield first, index
            first, tokens = index, 0
        tokens += length
    if tokens:
        yield first, len(lengths)


def _constant_states(model: MaskedCausalLM, patching: Examples, ablation: str, output_bias: str) -> States:
    """Mean (over all corrupted tokens, streaming, in float64) or zero states: one vector per writer."""
    if ablation == "zero":
        examples = patching.select(torch.arange(1))
        return model.run(examples.corrupted_input_ids, examples.attention_mask)[0].zero(output_bias)
    totals: list[Tensor] | None = None
    tokens = int(patching.attention_mask.sum())
    for first, last in token_chunks(patching.attention_mask.sum(1)):
        examples = patching.select(torch.arange(first, last))
        states = model.run(examples.corrupted_input_ids, examples.attention_mask)[0]
        sums = [part.double().sum(1, keepdim=True) for part in (states.embeds, states.heads, states.mlps)]
        totals = sums if totals is None else [total + part for total, part in zip(totals, sums, strict=True)]
    assert totals is not None
    embeds, heads, mlps = ((total / tokens).to(model.dtype) for total in totals)
    return States(embeds, heads, mlps)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _states_bytes(states: States) -> int:
    return _bytes(states.embeds) + _bytes(states.heads) + _bytes(states.mlps)

"""What does not depend on the masks: the full model's answer distributions and the ablated activations.

Both are computed once per example and kept (see :mod:`fastcircuit.evaluation.cache`).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastcircuit.circuit import ABLATIONS, OUTPUT_BIAS, Ablation
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.cache import Budgets, ReferenceCache
from fastcircuit.evaluation.metrics import kl_divergence
from fastcircuit.models.changing import Changing
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.models.packing import Packing
from fastcircuit.models.states import States, StatesShape
from fastcircuit.ops import answer_kl
from fastcircuit.ops.backends import is_compiled
from fastcircuit.ops.memory import ERRORS, Result, free_cached_memory, is_out_of_memory, with_less
from fastcircuit.tasks.task import Examples

CHUNK_TOKENS = 4096
# Tokens that cannot change are left out when they are at least this share of a batch: for fewer the layers of a small
# model gain nothing (stories260K: even at a third, 1.7 and 3.7 times as fast in GPT-2 small at .58 and .83).
LEAST_SHARED = 0.25
BATCH_SIZE = 64
OnNote = Callable[[str], None]


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
    """Some examples, ready for a masked run: packed clean tokens, ablated states, reference answers.

    Args:
        changing: the tokens that can differ from the ablated run; None: all, or so many that leaving the others out
            would save nothing.
    """

    size: int
    token_ids: Tensor
    packing: Packing
    ablated: States
    answers: Answers
    changing: Changing | None = None


class Reference:
    """Answer distributions and ablated states of ``examples`` under ``model``.

    Args:
        ablation: ``interchange`` (the corrupted run), ``mean`` (of ``patching``) or ``zero``.
        output_bias: under zero ablation, ``split`` (1/H of b_O goes with each head) or ``kept``.
        answer_tokens: restrict distributions to these tokens; None: the full vocabulary.
        patching: examples whose corrupted prompts give the means; None: ``examples`` themselves.
        budgets: bytes of states and distributions to keep; None: :meth:`Budgets.default`.
        on_note: called with a line when memory runs out and less is computed at once, or kept.

    Attributes:
        batch_size: examples that :meth:`over_batches` takes at a time; halved when memory runs out.
    """

    def __init__(
        self,
        model: MaskedCausalLM,
        examples: Examples,
        ablation: Ablation = "interchange",
        output_bias: str = "split",
        answer_tokens: tuple[int, ...] | None = None,
        patching: Examples | None = None,
        budgets: Budgets | None = None,
        on_note: OnNote | None = None,
    ) -> None:
        if ablation not in ABLATIONS:
            raise InputError(f"ablation is {ablation!r}; accepted: {', '.join(ABLATIONS)}")
        if output_bias not in OUTPUT_BIAS:
            raise InputError(f"output_bias is {output_bias!r}; accepted: {', '.join(OUTPUT_BIAS)}")
        self.model = model
        self.examples = examples
        self.on_note, self.batch_size = on_note, min(BATCH_SIZE, len(examples))
        self.interchange = ablation == "interchange"
        self.answer_tokens = None if answer_tokens is None else torch.tensor(answer_tokens, device=model.device)
        self.constant = (
            None if self.interchange else _constant_states(model, patching or examples, ablation, output_bias, on_note)
        )
        self.lengths = examples.attention_mask.sum(1)
        self.counts = examples.answer_mask.sum(1)
        self.shared = shared_tokens(examples, self.interchange and model.anatomy.causal)
        self.cache = self._cache(Budgets.default(model.device) if budgets is None else budgets, on_note)

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, most: int) -> "Reference":
        """The same on the first ``most`` examples; what is kept is shared."""
        if most >= len(self):
            return self
        part = copy.copy(self)
        part.examples = self.examples.select(torch.arange(most))
        part.lengths, part.counts, part.shared = self.lengths[:most], self.counts[:most], self.shared[:most]
        return part

    def batch(self, indices: Tensor) -> Batch:
        """The examples ``indices`` ``[B]``, from the cache where they are in it."""
        examples, packing, token_ids = self._packed(indices)
        if bool((indices >= self.cache.num_kept).all()):
            ablated, log_probs = self._compute(examples)
        else:
            rows, log_probs = self.cache.take(indices)
            ablated = self.states(rows)
        answers = self._answers(examples, packing, log_probs)
        return Batch(len(examples), token_ids, packing, ablated, answers, self._changing(indices, packing))

    def _changing(self, indices: Tensor, packing: Packing) -> Changing | None:
        """The tokens of some examples that can change, unless they are nearly all."""
        shared, lengths = self.shared[indices], self.lengths[indices]
        if int(shared.sum()) < LEAST_SHARED * int(lengths.sum()):
            return None
        first = torch.repeat_interleave(shared, lengths).to(packing.device)
        return Changing.of(packing.position_ids >= first)

    def bare_batch(self, indices: Tensor) -> Batch:
        """The examples ``indices`` without the full model's answers: for a caller that runs the full model itself."""
        examples, packing, token_ids = self._packed(indices)
        nothing = torch.empty(0, device=self.model.device)
        return Batch(
            len(examples), token_ids, packing, self._ablated(examples), self._answers(examples, packing, nothing)
        )

    def _packed(self, indices: Tensor) -> tuple[Examples, Packing, Tensor]:
        examples = self.examples.select(indices)
        packing = Packing(examples.input_ids.shape, examples.attention_mask, self.model.device)
        return examples, packing, packing.pack(examples.input_ids.to(self.model.device))

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, ``size`` at a time."""
        for chunk in torch.arange(len(self)).split(size):
            yield self.batch(chunk)

    def over_batches(self, measure: Callable[[Batch], Result]) -> list[Result]:
        """What ``measure`` returns for every batch, in order; of half as many examples from where memory runs out.

        Raises:
            RunError: memory ran out with a single example at a time.
        """
        found: list[Result] = []
        done = 0

        def measured() -> tuple[int, Result]:
            batch = self.batch(torch.arange(done, min(done + self.batch_size, len(self))))
            return batch.size, measure(batch)

        while done < len(self):
            size, result = with_less(measured, self.model.device, self._halve_batches)
            found.append(result)
            done += size
        return found

    def _halve_batches(self) -> None:
        if self.batch_size == 1:
            raise RunError(
                f"evaluation: out of memory with one example at a time; free memory on {self.model.device}, or use "
                "shorter prompts or a narrower dtype"
            )
        self.batch_size //= 2
        if self.on_note is not None:
            self.on_note(f"out of memory in evaluation: going on with {self.batch_size} examples at a time")

    def states(self, rows: Tensor | None) -> States:
        """The ablated states that rows of the cache hold; without rows, those of every token."""
        if rows is None:
            assert self.constant is not None
            return self.constant
        assert self.cache.shape is not None
        return self.cache.shape.view(rows)

    def restrict(self, logits: Tensor) -> Tensor:
        """Log-probabilities over the vocabulary or the answer tokens, float32 or better: ``[N, V] -> [N, V or A]``."""
        if self.answer_tokens is not None:
            logits = logits.index_select(1, self.answer_tokens)
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return torch.log_softmax(wide, dim=-1)

    def divergence(self, read: Tensor, log_probs: Tensor) -> Tensor:
        """KL(full model || circuit) in nats, ``[N]``, from final reads ``[N, d]`` and the full model's ``[N, V or A]``.

        Where there is a kernel for it, the circuit's logits are nowhere in memory (in backward, their gradient is).
        """
        model = self.model
        weight = self._unembedding
        if weight is not None and is_compiled("answer_kl", model.backend, read, weight, log_probs):
            return answer_kl(model.anatomy.final_norm(read), weight, log_probs, backend=model.backend)
        return kl_divergence(log_probs, self.restrict(model.unembed(read)))

    @property
    def _unembedding(self) -> Tensor | None:
        """Rows of the unembedding of the words that count, ``[V or A, d]``; None if it is more than a product."""
        head = self.model.anatomy.unembed
        if not isinstance(head, torch.nn.Linear) or head.bias is not None:
            return None
        return head.weight if self.answer_tokens is None else head.weight.index_select(0, self.answer_tokens)

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
    def _cache(self, budgets: Budgets, on_note: OnNote | None) -> ReferenceCache:
        """What fits of the first examples, computed chunk by chunk."""
        ablated, log_probs = self._compute(self.examples.select(torch.arange(1)))
        device = self.model.device

        def filled() -> ReferenceCache:
            cache = ReferenceCache(
                self.lengths,
                self.counts,
                StatesShape.of(ablated) if self.interchange else None,
                log_probs[:0],
                lambda indices: self._compute(self.examples.select(indices)),
                budgets,
            )
            cache.fill(partial(_in_chunks, self.lengths, device, on_note))
            return cache

        def keep_less() -> None:
            nonlocal budgets
            budgets = Budgets(budgets.device // 2, budgets.host // 2)
            if on_note is not None:
                on_note(f"out of memory: keeping at most {budgets.device / 2**20:.0f} MiB of the full model's results")

        return with_less(filled, device, keep_less)


def _in_chunks(
    lengths: Tensor,
    device: torch.device,
    on_note: OnNote | None,
    call: Callable[[int, int], None],
    first: int,
    last: int,
) -> None:
    """``call(first, last)`` for consecutive ranges of examples; for half as many tokens from where memory runs out."""
    most = CHUNK_TOKENS
    while first < last:
        _, end = next(token_chunks(lengths, most, first, last))
        try:
            call(first, end)
        except ERRORS as error:
            if end - first == 1 or not is_out_of_memory(error):
                raise
        else:
            first = end
            continue
        most = int(lengths[first:end].sum()) // 2
        free_cached_memory(device)
        if on_note is not None:
            on_note(f"out of memory in the full model: going on with about {most} tokens at a time")


def token_chunks(
    lengths: Tensor, most: int = CHUNK_TOKENS, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of the examples ``first`` to ``last``, of at most ``most`` tokens each (or one example)."""
    tokens, last = 0, len(lengths) if last is None else last
    for index, length in enumerate(lengths[first:last].tolist(), first):
        if tokens and tokens + length > most:
            yield first, index
            first, tokens = index, 0
        tokens += length
    if tokens:
        yield first, last


def _constant_states(
    model: MaskedCausalLM, patching: Examples, ablation: str, output_bias: str, on_note: OnNote | None
) -> States:
    """Mean (over all corrupted tokens, streaming, in float64) or zero states: one vector per writer."""
    if ablation == "zero":
        examples = patching.select(torch.arange(1))
        return model.run(examples.corrupted_input_ids, examples.attention_mask)[0].zero(output_bias)
    totals: list[Tensor] | None = None
    tokens = int(patching.attention_mask.sum())

    def add(first: int, last: int) -> None:
        nonlocal totals
        examples = patching.select(torch.arange(first, last))
        states = model.run(examples.corrupted_input_ids, examples.attention_mask)[0]
        sums = [part.double().sum(1, keepdim=True) for part in (states.embeds, states.heads, states.mlps)]
        totals = sums if totals is None else [total + part for total, part in zip(totals, sums, strict=True)]

    _in_chunks(patching.attention_mask.sum(1), model.device, on_note, add, 0, len(patching))
    assert totals is not None
    embeds, heads, mlps = ((total / tokens).to(model.dtype) for total in totals)
    return States(embeds, heads, mlps)


def shared_tokens(examples: Examples, any_shared: bool) -> Tensor:
    """How many tokens a clean prompt and its corrupted one begin with alike, up to the first answer, ``[N]``."""
    if not any_shared:
        return torch.zeros(len(examples), dtype=torch.int64)
    stops = (examples.input_ids != examples.corrupted_input_ids) | examples.answer_mask | ~examples.attention_mask
    return (stops.long().cumsum(1) == 0).sum(1)

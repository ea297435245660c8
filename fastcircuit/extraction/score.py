"""How well pruned models stand in for the original on held-out examples, with bootstrap confidence intervals."""

import numpy as np
import torch
from torch import Tensor

from fastcircuit.evaluation.bootstrap import Interval, bootstrap
from fastcircuit.evaluation.metrics import accuracy, exact_match, example_means, kl_divergence, logit_difference
from fastcircuit.extraction.ablation import check_finite
from fastcircuit.extraction.blocks import LayerConstants, PrunedBlock, Suffix
from fastcircuit.extraction.prefix import original_block
from fastcircuit.extraction.prompts import Prompts, chunked
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.tasks.task import Examples


@torch.no_grad()
def score(
    model: MaskedCausalLM,
    constants: Constants,
    circuits: list[Kept],
    examples: Examples,
    answer_tokens: tuple[int, ...] | None = None,
    seed: int = 0,
) -> list[dict[str, Interval]]:
    """Metrics of several pruned models; the original model runs once for all.

    Args:
        answer_tokens: accuracy and exact match compare among these; None: the full vocabulary. KL is always over the
            full vocabulary.

    Returns:
        Per circuit: ``kl`` (nats), ``accuracy``, ``exact_match``, ``model_accuracy``, ``accuracy_change`` (pruned minus
        original, paired) and, where there are distractors, ``logit_difference`` and ``model_logit_difference`` (nats).
    """
    distinct = {_key(kept): kept for kept in circuits}
    collected: dict[bytes, list[dict[str, Tensor]]] = {key: [] for key in distinct}
    original = Suffix(tuple(original_block(model, constants, layer) for layer in range(model.graph.num_layers)))
    outside = _outside(model, answer_tokens)
    first = 0
    for chunk in chunked(model, examples):
        part = examples.select(slice(first, first + chunk.packing.shape[0]))
        first += len(part)
        reference = _answers(original, chunk)
        check_finite(model, reference)
        for key, kept in distinct.items():
            pruned = pruned_model(model, constants, kept)
            collected[key].append(_per_example(reference, _answers(pruned, chunk), part, outside))
    intervals = {
        key: _intervals({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, seed)
        for key, rows in collected.items()
    }
    return [intervals[_key(kept)] for kept in circuits]


def pruned_model(model: MaskedCausalLM, constants: Constants, kept: Kept) -> Suffix:
    """The whole pruned model, from the embeddings up."""
    blocks, removed = [], ~np.column_stack([kept.heads, kept.mlps])
    for layer, block in enumerate(model.anatomy.blocks):
        blocks.append(PrunedBlock(block, LayerConstants.of(constants, layer), removed[layer], model.anatomy.causal))
    return Suffix(tuple(blocks), tuple(removed))


def _key(kept: Kept) -> bytes:
    return kept.heads.tobytes() + kept.mlps.tobytes()


def _answers(pruned: Suffix, chunk: Prompts) -> Tensor:
    """Log-probabilities at the answers, ``[N, V]``."""
    stream = pruned.rows(chunk).narrow(chunk.embed()[None], chunk.every)
    return chunk.predict(pruned(stream, chunk))[0]


def _outside(model: MaskedCausalLM, answer_tokens: tuple[int, ...] | None) -> Tensor:
    """0 at the tokens to compare among, -inf elsewhere, ``[V]``."""
    if answer_tokens is None:
        return torch.zeros(model.config.vocab_size, device=model.device)
    outside = torch.full((model.config.vocab_size,), -torch.inf, device=model.device)
    outside[list(answer_tokens)] = 0
    return outside


def _per_example(reference: Tensor, log_probs: Tensor, examples: Examples, outside: Tensor) -> dict[str, Tensor]:
    """Every metric as the mean over each example's answers, float64 ``[B]``; NaN where it is not defined."""
    right, wrong = (
        part[examples.answer_mask].to(log_probs.device) for part in (examples.answers, examples.distractors)
    )
    hits, model_hits = (accuracy(values + outside, right).double() for values in (log_probs, reference))
    metrics = {
        "kl": kl_divergence(reference, log_probs),
        "accuracy": hits,
        "exact_match": exact_match(reference + outside, log_probs + outside),
        "logit_difference": logit_difference(log_probs, right, wrong),
        "model_accuracy": model_hits,
        "model_logit_difference": logit_difference(reference, right, wrong),
        "accuracy_change": hits - model_hits,
    }
    example = examples.answer_mask.nonzero()[:, 0]
    return {name: example_means(values.double().cpu(), example, len(examples)) for name, values in metrics.items()}


def _intervals(metrics: dict[str, Tensor], seed: int) -> dict[str, Interval]:
    known = {name: values.numpy() for name, values in metrics.items() if not bool(values.isnan().all())}
    return dict(zip(known, bootstrap(np.stack(list(known.values())), seed), strict=True))

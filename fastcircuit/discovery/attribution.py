"""Attribution: a score for every edge from a few passes over the data.

EAP: Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery". EAP-IG: Hanna, Pezzelle
and Belinkov 2024, "Have Faith in Faithfulness".

The score of edge (j -> r) estimates by how much the loss rises when the edge is removed: to first order
``-<D_j, g_r>``, with ``D_j`` the writer's clean minus ablated output and ``g_r`` the gradient of the loss at the
reader's input, summed over tokens, averaged over examples. The methods differ in where the gradient is taken.

    eap                 at the clean run
    eap-ig              on the way from the ablated embeddings to the clean ones, m points averaged
    eap-ig-activations  one site at a time, its output on the way from ablated to clean, m points each, averaged
    clean-corrupted     at both ends of eap-ig's way, averaged
    exact               nowhere: every edge is removed and the rise measured (see ``exact.py``)
    random              nowhere: standard normal scores, to compare with

A writer's score is the sum of its edges', which is the same estimate for the writer as a whole.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcircuit.circuit import ABLATIONS, OUTPUT_BIAS, Ablation
from fastcircuit.discovery.exact import exact_rises
from fastcircuit.discovery.losses import LOSSES, examples_with_loss
from fastcircuit.discovery.plain_run import PlainRun
from fastcircuit.discovery.points import CleanPoint, clean_points
from fastcircuit.discovery.scores import Scores, check_computed, node_scores
from fastcircuit.errors import InputError
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import OnNote, Reference
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

METHODS = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact", "random")
DEFAULT_STEPS = 5
BATCH_BYTES = 2**29

OnBatch = Callable[[int, int], None]


def attribute(
    model: MaskedCausalLM,
    task: Task,
    method: str = "eap-ig",
    *,
    split: str = "train",
    loss: str | None = None,
    ig_steps: int = DEFAULT_STEPS,
    ablation: Ablation = "interchange",
    output_bias: str = "split",
    seed: int = 0,
    batch_bytes: int = BATCH_BYTES,
    on_batch: OnBatch | None = None,
    on_note: OnNote | None = None,
) -> Scores:
    """Score every edge and writer of ``model`` for ``task``.

    Args:
        method: one of ``METHODS`` (see the module).
        loss: ``kl`` (to the full model), ``logit-difference`` (wrong minus right) or ``nll``; None: ``kl``, and
            ``logit-difference`` for ``eap``, since the gradient of the KL at the clean run is zero.
        ig_steps: points m of the integrated gradients.
        ablation, output_bias: what a removed edge carries (see ``evaluation.reference``).
        seed: of ``random``.
        batch_bytes: size of the differences held at a time; decides how many examples go together.
        on_batch: called with the examples (``exact``: edges) done and how many there are.
        on_note: called with a line when memory runs out and less is computed at once.

    Raises:
        InputError: unknown method or loss, or examples without what the loss needs.
        RunError: a score is not finite.
    """
    check_attribution(method, loss, ig_steps, ablation, output_bias)
    if method == "random":
        edge = np.random.default_rng(seed).standard_normal(model.graph.num_edges)
        return Scores(model.graph, edge, node_scores(model.graph, edge), ablation, output_bias)
    loss = loss or ("logit-difference" if method == "eap" else "kl")
    examples = task.split(split)
    patching = task.split("train") if ablation == "mean" else None
    reference = Reference(model, examples, ablation, output_bias, task.answer_tokens, patching, Budgets(0, 0), on_note)
    num_examples = examples_with_loss(loss, reference)
    edge, node, done = np.zeros(model.graph.num_edges), np.zeros(model.graph.num_writers), 0
    for point in clean_points(reference, loss, batch_bytes, keep_graphs=method in _AT_CLEAN):
        if method == "exact":
            of_edges, of_nodes = exact_rises(point)
        else:
            of_edges = -_GRADIENTS[method](point, ig_steps).double().cpu().numpy()
            of_nodes = node_scores(model.graph, of_edges)
        edge, node = edge + of_edges, node + of_nodes
        done += point.batch.size
        if on_batch is not None:
            on_batch(done, len(examples))
    edge, node = edge / num_examples, node / num_examples
    check_computed(model.graph, edge)
    return Scores(model.graph, edge, node, ablation, output_bias)


def check_attribution(method: str, loss: str | None, ig_steps: int, ablation: str, output_bias: str) -> None:
    """InputError for what no model or task could make right."""
    if method not in METHODS:
        raise InputError(f"no method {method!r}; attribution methods are {', '.join(METHODS)}")
    if loss is not None and loss not in LOSSES:
        raise InputError(f"no loss {loss!r}; losses are {', '.join(LOSSES)}")
    if method == "eap" and loss == "kl":
        raise InputError(
            "the gradient of the KL to the full model is zero at the full model, where eap takes it; "
            "use loss logit-difference or nll, or method eap-ig"
        )
    if ig_steps < 1:
        raise InputError(f"ig_steps is {ig_steps}; integrated gradients need at least 1")
    for name, value, accepted in (("ablation", ablation, ABLATIONS), ("output_bias", output_bias, OUTPUT_BIAS)):
        if value not in accepted:
            raise InputError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")


def _eap(point: CleanPoint, steps: int) -> Tensor:
    scores = _no_scores(point)
    point.clean.backward(point.gradient(point.clean.streams[point.clean.num_sites]), point.differences, scores)
    return scores


def _eap_ig(point: CleanPoint, steps: int) -> Tensor:
    """At ``k / m``, k from 0 (ablated), as published; from 1 where the way starts at zero, which no norm takes well."""
    first = 1 if _from_nothing(point) else 0
    return _mean_over_inputs(point, [k / steps for k in range(first, first + steps)])


def _clean_corrupted(point: CleanPoint, steps: int) -> Tensor:
    return _mean_over_inputs(point, [1.0, 0.0])


def _eap_ig_activations(point: CleanPoint, steps: int) -> Tensor:
    """One site after the other is replaced by ``k / m`` of the way to clean, k from 1.

    What is in front of a replaced site is the clean run, where gradients of all these runs pass through the same
    linear map: they are summed in front of their sites and passed back together.
    """
    scores, clean, ablated = _no_scores(point), point.clean, point.batch.ablated
    run, graph = point.run(), clean.graph
    mixes = [k / steps for k in range(1, steps + 1)]
    _at_inputs(point, run, mixes, scores)
    waiting: dict[int, Tensor] = {}
    for site in range(clean.num_sites):
        states = ablated.take(clean.answers) if site >= clean.num_sites - 2 else ablated
        off = states.mlps[site // 2] if site % 2 else states.heads[site // 2]
        off = clean.written(site, off, with_bias=states.has_output_bias)
        on = clean.written(site, clean.outputs[site])
        stream = clean.narrowed(site, clean.streams[site])
        grads = []
        for mix in mixes:
            read = run.forward(stream + mix * on + (1 - mix) * off, site + 1)
            grads.append(run.backward(point.gradient(read), point.differences, scores, site + 1))
        waiting[site] = torch.stack(grads).sum(0)
    behind = torch.zeros_like(waiting[clean.num_sites - 1])
    for site in reversed(range(clean.num_sites)):
        behind = clean.pass_back(site, behind, point.differences, scores) + clean.widened(site, waiting[site])
    return scores / (steps * (2 * graph.num_layers + 1))


def _mean_over_inputs(point: CleanPoint, mixes: list[float]) -> Tensor:
    scores = _no_scores(point)
    _at_inputs(point, point.run(), mixes, scores)
    return scores / len(mixes)


def _at_inputs(point: CleanPoint, run: PlainRun, mixes: list[float], scores: Tensor) -> None:
    """Add the gradients with ``mix`` of the clean and ``1 - mix`` of the ablated embeddings, for every mix."""
    clean, ablated = point.embeds.sum(0), point.batch.ablated.embeds.sum(0)
    for mix in mixes:
        read = run.forward(mix * clean + (1 - mix) * ablated)
        run.backward(point.gradient(read), point.differences, scores)


def _no_scores(point: CleanPoint) -> Tensor:
    model = point.reference.model
    return torch.zeros(model.graph.num_edges, dtype=model.mask_dtype, device=model.device)


def _from_nothing(point: CleanPoint) -> bool:
    return not bool(point.batch.ablated.embeds.any())


_AT_CLEAN = ("eap", "eap-ig-activations")
_GRADIENTS: dict[str, Callable[[CleanPoint, int], Tensor]] = {
    "eap": _eap,
    "eap-ig": _eap_ig,
    "eap-ig-activations": _eap_ig_activations,
    "clean-corrupted": _clean_corrupted,
}

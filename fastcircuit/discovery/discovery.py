"""``discover``: from a model and a task to a circuit with exactly as many edges as asked for."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import acdc, attribution, baselines, upstream
from fastcircuit.discovery.baselines import BaselineSettings, OnProgress
from fastcircuit.discovery.edge_pruning import COLUMNS, EdgePruning, Report
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.planner import planned
from fastcircuit.discovery.refine import OnRound, Refiner
from fastcircuit.discovery.rounding import check_num_edges, edges_for_sparsity, top_circuit
from fastcircuit.discovery.settings import Settings
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.reference import OnNote, Reference
from fastcircuit.files import write_atomically
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Task

METHODS = ("edge-pruning", *baselines.METHODS)
DEFAULT_SPARSITY = 0.95
MOST_TO_ELIMINATE = 256


@dataclass(frozen=True)
class Discovery:
    """What :func:`discover` found.

    Args:
        circuit: the kept edges.
        masks: Edge Pruning's log-alphas (higher: kept more surely), or the scores of another method: ``edge``
            ``[num_edges]`` and ``node`` ``[num_writers]``.
        history: Edge Pruning: one row per step: step, KL, penalty, edge sparsity, its target (float64 ``[steps, 5]``);
            ACDC: one per edge (see ``acdc.py``); no rows for the others.
        columns: what is in a row.
    """

    circuit: Circuit
    masks: Masks
    history: Tensor
    columns: tuple[str, ...] = COLUMNS

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write ``circuit.json`` and ``masks.safetensors`` (``edge``, ``node``, ``history``) into ``directory``."""
        circuit, masks = Path(directory) / "circuit.json", Path(directory) / "masks.safetensors"
        assert self.masks.node is not None
        tensors = {"edge": self.masks.edge, "node": self.masks.node, "history": self.history}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"format": "fastcircuit.masks/1", "columns": ",".join(self.columns)}
        write_atomically(masks, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        try:
            self.circuit.save(circuit)
        except RunError:
            masks.unlink()  # of no use alone, and not of an earlier circuit that may lie there
            raise
        return [circuit, masks]


def discover(
    model: MaskedCausalLM,
    task: Task,
    method: str = "edge-pruning",
    *,
    sparsity: float | None = None,
    edges: int | None = None,
    kl_budget: float | None = None,
    settings: Settings | BaselineSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_round: OnRound | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    execution: Execution | None = None,
    **changes: Any,
) -> Discovery:
    """Find the circuit of ``task`` in ``model`` on its train split.

    Args:
        method: ``edge-pruning``, ``acdc``, or an attribution: ``eap``, ``eap-ig``, ``eap-ig-activations``,
            ``clean-corrupted``, ``exact``, ``random`` (see ``attribution.py``).
        sparsity: fraction of edges to remove; the circuit keeps exactly ``round((1 - sparsity) * num_edges)``.
        edges: number of edges to keep instead. With neither, sparsity is 0.95, or, with ``upstream_compat`` and an
            ``edge_target`` (published presets have one), whatever the run arrives at.
            ACDC's circuit is as large as its threshold makes it.
        kl_budget: keep as few edges as are found to hold the training KL within this many nats, instead: the surest
            ones that do, less, one by one, all that are not needed (see ``refine.py``). The run aims at 0.95.
        settings: hyperparameters, :class:`BaselineSettings` for any method but Edge Pruning; ``changes`` are changes to
            them (``steps=500``, ``threshold=0.01``, ``nodes=20``).
        checkpoint: file that Edge Pruning writes during the run; with ``resume`` the run is taken up from it, otherwise
            what it holds is removed when the run starts.
        on_report: called every few steps with a :class:`Report`.
        on_round: called after every round of refinement with the stage, its rounds done, the most there are, and the
            training KL.
        on_progress: called by the other methods with the method, how much is done, and how much there is to do.
        on_note: called with a line when memory runs out and the run goes on with less at a time.
        execution: how the steps are carried out; the result does not depend on it.

    Raises:
        InputError: unknown method or setting, a task the model cannot run.
        RunError: the loss is not finite.
    """
    if method not in METHODS:
        raise InputError(f"no method {method!r}; methods are {', '.join(METHODS)}")
    if method != "edge-pruning":
        if resume:
            raise InputError(f"method {method} has no checkpoint to resume; run it again")
        if kl_budget is not None:
            raise InputError(f"kl_budget is for edge-pruning; with {method} give edges, sparsity or a threshold")
        return _baseline(model, task, method, settings, changes, sparsity, edges, on_progress, on_note)
    if isinstance(settings, BaselineSettings):
        raise InputError("edge-pruning takes Settings, not BaselineSettings")
    settings = (settings or Settings()).changed(changes)
    num_edges = _edges_wanted(model, settings, sparsity, edges, kl_budget)
    ranking = None if resume else _warm_ranking(model, task, settings, on_progress, on_note)
    train = training_pairs(task, settings)
    choices = None if task.answer_tokens is None else len(task.answer_tokens)
    execution = planned(model, train, settings, execution or Execution(), choices, on_note)
    reference = Reference(model, train, settings.ablation, settings.output_bias, task.answer_tokens, on_note=on_note)
    run = EdgePruning(
        reference,
        num_edges or model.graph.num_edges,
        settings,
        identity_of(model, task),
        ranking,
        execution,
        on_note,
    )
    path = None if checkpoint is None else Path(checkpoint)
    if resume:
        if path is None:
            raise InputError("resume needs the checkpoint to resume from")
        run.resume(path)
    elif path is not None:
        path.unlink(missing_ok=True)  # of an earlier run: should this one fail, it is not what was kept
    run.run(path, on_report=on_report)
    return _finish(run, task, num_edges, kl_budget, on_round)


def training_pairs(task: Task, settings: Settings) -> Examples:
    """What a run of Edge Pruning learns from."""
    train = task.split("train")
    return train.both_directions() if settings.both_directions else train


def identity_of(model: MaskedCausalLM, task: Task) -> dict[str, Any]:
    """What a run is of: a checkpoint is taken up by runs of the same alone."""
    train = task.split("train")
    return {
        "model": model.about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "graph": dataclasses.asdict(model.graph),
        "task": task.name,
        "answer_tokens": task.answer_tokens,
        "examples": len(train),
        "training_pairs_hash": train.fingerprint(),
    }


def _warm_ranking(
    model: MaskedCausalLM,
    task: Task,
    settings: Settings,
    on_progress: OnProgress | None,
    on_note: OnNote | None,
) -> np.ndarray | None:
    """What a warm start ranks the edges by, ``[num_edges]``."""
    if settings.warm_start is None:
        return None
    if settings.warm_start not in attribution.METHODS:
        raise InputError(f"warm_start is {settings.warm_start!r}; accepted: {', '.join(attribution.METHODS)}")
    start = BaselineSettings(ablation=settings.ablation, output_bias=settings.output_bias, seed=settings.seed)
    return baselines.scores_of(model, task, settings.warm_start, start, on_progress, on_note).ranking()


def _baseline(
    model: MaskedCausalLM,
    task: Task,
    method: str,
    settings: Settings | BaselineSettings | None,
    changes: dict[str, Any],
    sparsity: float | None,
    edges: int | None,
    on_progress: OnProgress | None,
    on_note: OnNote | None,
) -> Discovery:
    """Any method but Edge Pruning."""
    if isinstance(settings, Settings):
        raise InputError(f"method {method} takes BaselineSettings; Settings are Edge Pruning's")
    settings = (settings or BaselineSettings()).changed(changes)
    circuit, scores, history = baselines.find(model, task, method, settings, sparsity, edges, on_progress, on_note)
    masks = Masks(torch.from_numpy(scores.edge), torch.from_numpy(scores.node))
    circuit = _described(circuit, model, task, method, settings)
    return Discovery(circuit, masks, torch.from_numpy(history), acdc.COLUMNS)


def _described(
    circuit: Circuit, model: MaskedCausalLM, task: Task, method: str, settings: Settings | BaselineSettings
) -> Circuit:
    """The circuit with what it was found in, for and by."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    provenance = {"method": method, "settings": settings.to_dict(), "versions": versions}
    return dataclasses.replace(
        circuit, model=model.about, task=task.name, output_bias=settings.output_bias, provenance=provenance
    )


def _edges_wanted(
    model: MaskedCausalLM, settings: Settings, sparsity: float | None, edges: int | None, kl_budget: float | None
) -> int | None:
    if sum(given is not None for given in (sparsity, edges, kl_budget)) > 1:
        raise InputError("give one of sparsity, edges and kl_budget, not both")
    if kl_budget is not None:
        if not 0 < kl_budget < float("inf"):
            raise InputError(f"kl_budget is {kl_budget}; it must be above 0, a number of nats")
        if settings.upstream_compat:
            raise InputError("kl_budget is not part of the published method; leave it out, or upstream_compat")
        sparsity = DEFAULT_SPARSITY
    if edges is not None:
        return check_num_edges(model.graph, edges)
    if sparsity is None:
        if settings.upstream_compat:
            if settings.edge_target is None:
                raise InputError("upstream_compat has no size to aim at; give edges, sparsity, a preset or edge_target")
            return None
        sparsity = DEFAULT_SPARSITY
    return edges_for_sparsity(model.graph, sparsity)


def _best_of_size(run: EdgePruning, num_edges: int, on_round: OnRound | None) -> Circuit:
    """The surest ``num_edges`` edges; refined, or what elimination leaves of a few more if its training KL is lower."""
    graph, settings, scores = run.model.graph, run.settings, run.parameters.scores()
    best = top_circuit(graph, scores, num_edges, settings.ablation)
    if not settings.refine:
        return best
    refiner = Refiner(run.reference, on_round=on_round, on_note=run.on_note)
    if num_edges <= MOST_TO_ELIMINATE:
        more = min(graph.num_edges, num_edges + settings.refine_surplus)
        eliminated = refiner.eliminate(top_circuit(graph, scores, more, settings.ablation), num_edges)
        best = min(best, eliminated or best, key=refiner.kl)
        best = refiner.regrow(best, settings.refine_surplus, settings.refine_cycles)
    return refiner.finish(best, settings.refine_swaps)


def _fewest_within(run: EdgePruning, kl_budget: float, on_round: OnRound | None) -> Circuit:
    """The fewest of the surest edges that hold the training KL within the budget, less those that are not needed."""
    graph, ablation, scores = run.model.graph, run.settings.ablation, run.parameters.scores()
    refiner = Refiner(run.reference, on_round=on_round, on_note=run.on_note)

    def circuit(num_edges: int) -> Circuit:
        return top_circuit(graph, scores, num_edges, ablation)

    low, high = 0, 1
    while high < graph.num_edges and refiner.kl(circuit(high)) > kl_budget:
        low, high = high, min(2 * high, graph.num_edges)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refiner.kl(circuit(middle)) <= kl_budget else (middle, high)
    return refiner.eliminate_within(circuit(high), kl_budget)


def _finish(
    run: EdgePruning, task: Task, num_edges: int | None, kl_budget: float | None, on_round: OnRound | None
) -> Discovery:
    settings, parameters = run.settings, run.parameters
    if settings.upstream_compat:
        circuit = upstream.published_circuit(parameters, num_edges, run.model.config.model_type)
    elif kl_budget is not None:
        circuit = _fewest_within(run, kl_budget, on_round)
    else:
        assert num_edges is not None
        circuit = _best_of_size(run, num_edges, on_round)
    circuit = _described(circuit, run.model, task, "edge-pruning", settings)
    if kl_budget is not None:
        circuit = dataclasses.replace(circuit, provenance={**circuit.provenance, "kl_budget": kl_budget})
    masks = Masks(parameters.edge.detach().cpu(), parameters.node.detach().cpu())
    return Discovery(circuit, masks, torch.tensor(run.history, dtype=torch.float64))

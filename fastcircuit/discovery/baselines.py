"""Circuits without optimisation: the best edges or writers of an attribution, and ACDC's decisions."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcircuit.circuit import ABLATIONS, OUTPUT_BIAS, Ablation, Circuit
from fastcircuit.discovery import acdc as greedy
from fastcircuit.discovery import attribution
from fastcircuit.discovery.rounding import check_num_edges, edges_for_sparsity
from fastcircuit.discovery.scores import Scores, node_scores
from fastcircuit.errors import InputError, check_seed
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import OnNote, Reference
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Examples, Task

METHODS = (*attribution.METHODS, "acdc")
DEFAULT_SPARSITY = 0.95
DEFAULT_THRESHOLD = 0.01

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BaselineSettings:
    """How to run a method that is not Edge Pruning.

    Args:
        loss, ig_steps: of an attribution (see :func:`fastcircuit.discovery.attribution.attribute`).
        nodes: keep this many writers and every edge between them, instead of a number of edges.
        threshold: ``acdc``: the KL rise, in nats, from which an edge stays (None: 0.01); attributions: keep every edge
            that scores at least this, instead of a number of edges.
        signed: rank edges by their score, negative ones last, instead of by its size.
        pruned: edges that cannot matter (see :meth:`Circuit.pruned`) are not kept, and do not count; False: keep what
            the scores or ACDC's decisions say, dangling edges included.
        most_examples: work on so many train examples, the first; None: on all. ACDC holds all of them in memory.
        ablation, output_bias: what a removed edge carries (see ``evaluation.reference``).
        seed: of ``random``.
    """

    loss: str | None = None
    ig_steps: int = attribution.DEFAULT_STEPS
    nodes: int | None = None
    threshold: float | None = None
    signed: bool = False
    pruned: bool = True
    most_examples: int | None = None
    ablation: Ablation = "interchange"
    output_bias: str = "split"
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.most_examples is not None and self.most_examples < 1:
            raise InputError(f"most_examples is {self.most_examples}; it must be at least 1")
        for name, accepted in (("ablation", ABLATIONS), ("output_bias", OUTPUT_BIAS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")

    def changed(self, changes: dict[str, Any]) -> "BaselineSettings":
        """These settings with some changed by name; InputError for a name there is not."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise InputError(f"no setting {unknown[0]!r} without edge-pruning; settings are {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find(
    model: MaskedCausalLM,
    task: Task,
    method: str,
    settings: BaselineSettings,
    sparsity: float | None = None,
    edges: int | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> tuple[Circuit, Scores, np.ndarray]:
    """The circuit of a baseline, the scores it comes from, and ACDC's history (no rows for the others).

    Args:
        sparsity, edges: the circuit's size, unless ``settings`` choose by writers or threshold.

    Raises:
        InputError: the size is said in no way or in two, or is more than the graph has.
    """

    choose = _choice(model, method, settings, sparsity, edges)
    if method == "acdc":
        reference = Reference(
            model,
            _train(task, settings),
            settings.ablation,
            settings.output_bias,
            task.answer_tokens,
            budgets=Budgets(0, 0),
            on_note=on_note,
        )
        found = greedy.acdc(reference, _acdc_threshold(settings), _reporter(method, on_progress))
        nodes = node_scores(model.graph, found.rises)
        scores = Scores(model.graph, found.rises, nodes, settings.ablation, settings.output_bias)
        circuit = Circuit(model.graph, found.keep, ablation=settings.ablation)
        return circuit.pruned() if settings.pruned else circuit, scores, found.history
    scores = scores_of(model, task, method, settings, on_progress, on_note)
    return choose(scores), scores, np.zeros((0, len(greedy.COLUMNS)))


def scores_of(
    model: MaskedCausalLM,
    task: Task,
    method: str,
    settings: BaselineSettings,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> Scores:
    """The scores of an attribution on the train split."""
    return attribution.attribute(
        model,
        dataclasses.replace(task, splits={**task.splits, "train": _train(task, settings)}),
        method,
        loss=settings.loss,
        ig_steps=settings.ig_steps,
        ablation=settings.ablation,
        output_bias=settings.output_bias,
        seed=settings.seed,
        on_batch=_reporter(method, on_progress),
        on_note=on_note,
    )


def _train(task: Task, settings: BaselineSettings) -> Examples:
    return task.split("train").select(slice(settings.most_examples))


def _reporter(method: str, on_progress: OnProgress | None) -> Callable[..., None]:
    def report(done: int, most: int, *_: float) -> None:
        if on_progress is not None:
            on_progress(method, done, most)

    return report


def _choice(
    model: MaskedCausalLM, method: str, settings: BaselineSettings, sparsity: float | None, edges: int | None
) -> Callable[[Scores], Circuit]:
    """How the circuit follows from the scores; what is wrong with that is said before any work is done."""
    graph, absolute = model.graph, not settings.signed
    sizes = {"sparsity": sparsity, "edges": edges, "nodes": settings.nodes, "threshold": settings.threshold}
    given = [name for name, value in sizes.items() if value is not None]
    if method == "acdc":
        if set(given) - {"threshold"}:
            raise InputError(f"acdc takes no {given[0]}: its circuit is as large as its threshold makes it")
        greedy.check_threshold(_acdc_threshold(settings))
    elif len(given) > 1:
        raise InputError(f"give {' or '.join(given)}, not both")
    if settings.nodes is not None:
        nodes = settings.nodes
        if not 1 <= nodes <= graph.num_writers:
            raise InputError(f"nodes is {nodes}; this model has 1 to {graph.num_writers} writers to keep")
        return lambda scores: scores.node_circuit(nodes, absolute=absolute, pruned=settings.pruned)
    if settings.threshold is not None:
        return lambda scores: scores.circuit(threshold=settings.threshold, absolute=absolute, pruned=settings.pruned)
    if edges is None:
        edges = edges_for_sparsity(graph, DEFAULT_SPARSITY if sparsity is None else sparsity)
    check_num_edges(graph, edges)
    return lambda scores: scores.circuit(edges, absolute=absolute, pruned=settings.pruned)


def _acdc_threshold(settings: BaselineSettings) -> float:
    return DEFAULT_THRESHOLD if settings.threshold is None else settings.threshold

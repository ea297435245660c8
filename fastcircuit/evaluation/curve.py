"""Faithfulness at many sizes, and the areas CPR and CMD of the MIB benchmark (Mueller et al. 2025).

``f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing))``: the share of the model's metric m that a circuit recovers,
where nothing is the circuit without edges. CPR, "circuit performance ratio", is the area under f over the fraction of
edges kept; CMD, "circuit-model distance", that under ``|1 - f|``: trapezoids between the sizes measured. As in MIB, the
fraction is the nominal one of the grid: of the best ``int(fraction * edges)`` edges, those that cannot matter go too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.evaluation.bootstrap import CONFIDENCE, Interval, check_bootstrap
from fastcircuit.evaluation.faithfulness import check_circuit_fits, score_examples, shared_ablation, task_reference
from fastcircuit.evaluation.reference import OnNote, Reference
from fastcircuit.evaluation.registry import Question, choose, performance_metric
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Faithfulness:
    """What circuits of several sizes recover of a metric.

    Args:
        metric: its name.
        model, nothing: the metric of the full model and of the circuit without edges.
        points: one row per circuit, ascending: ``edges``, ``fraction`` (of all edges; nominal, if those were given),
            the metric, ``faithfulness``.
        cpr, cmd: the areas, between the smallest and the largest fraction; with their intervals' bounds where those
            were asked for.
    """

    metric: str
    model: float
    nothing: float
    points: list[dict[str, Any]]
    cpr: Interval | float
    cmd: Interval | float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "metric": self.metric,
            "model": self.model,
            "nothing": self.nothing,
            "points": self.points,
            "cpr": _area(self.cpr),
            "cmd": _area(self.cmd),
        }


def grid(total: int, fractions: Sequence[float] = MIB_FRACTIONS) -> list[int]:
    """Edges taken at every fraction of ``total``, rounded down as MIB does: none, where that is less than one."""
    return [int(fraction * total) for fraction in fractions]


def faithfulness_curve(
    model: MaskedCausalLM,
    circuits: Iterable[Circuit],
    task: Task,
    split: str = "test",
    metric: str | None = None,
    resamples: int = 0,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    on_circuit: Callable[[int], None] | None = None,
    on_note: OnNote | None = None,
    fractions: Sequence[float] | None = None,
) -> Faithfulness:
    """Faithfulness of a family of circuits; the full model is always one of them.

    Args:
        fractions: of all edges, one per circuit, ascending: where the areas have them; None: the fractions they keep.
        metric: one that the full model has too; None: the task's (see ``registry.performance_metric``).
        resamples: bootstrap resamples of the examples, for intervals of the areas; 0: none.
        on_circuit: called with the circuits measured so far, the full model not counted.
        on_note: called with a line when memory runs out and smaller batches are used.

    Raises:
        InputError: a circuit of another model, circuits of several ablations, a metric that the task has not got, or
            one that the full model has no more of than the circuit without edges.
    """
    family, shares = _family(model, circuits, fractions)
    reference = task_reference(model, family[0].ablation, task, split, family[0].output_bias, on_note=on_note)
    name = _checked_metric(metric, Question.of(reference, task))
    empty = Circuit(model.graph, np.zeros(model.graph.num_edges, dtype=bool), ablation=family[0].ablation)
    nothing, whole = (_examples(reference, circuit, name, task) for circuit in (empty, family[-1]))
    _check_apart(float(np.nanmean(nothing)), float(np.nanmean(whole)), name, split)
    values = []
    for circuit in family[:-1]:
        values.append(_examples(reference, circuit, name, task))
        if on_circuit is not None:
            on_circuit(len(values))
    table = np.stack([nothing, *values, whole])  # [circuits, examples]
    means = np.nanmean(table, axis=1)
    recovered = _recovered(means)
    points = [
        {"edges": circuit.num_edges, "fraction": float(fraction), name: float(mean), "faithfulness": float(share)}
        for circuit, fraction, mean, share in zip(family, shares, means[1:], recovered, strict=True)
    ]
    areas = _areas(shares, recovered)
    if not resamples:
        return Faithfulness(name, float(means[-1]), float(means[0]), points, *map(float, areas))
    low, high = _bounds(table, shares, resamples, confidence, seed)
    intervals = [Interval(float(mean), float(a), float(b)) for mean, a, b in zip(areas, low, high, strict=True)]
    return Faithfulness(name, float(means[-1]), float(means[0]), points, *intervals)


def _family(
    model: MaskedCausalLM, circuits: Iterable[Circuit], fractions: Sequence[float] | None
) -> tuple[list[Circuit], np.ndarray]:
    """The circuits, smallest first, and the full model behind them; and the fraction of all edges of each."""
    family = sorted(circuits, key=lambda circuit: circuit.num_edges)
    if fractions is not None and (len(fractions) != len(family) or sorted(fractions) != list(fractions)):
        raise InputError(f"{len(fractions)} fractions for {len(family)} circuits; give one each, ascending")
    ablation, output_bias = shared_ablation(family)
    for circuit in family:
        check_circuit_fits(model, circuit)
    total = model.graph.num_edges
    kept = list(fractions) if fractions is not None else [circuit.num_edges / total for circuit in family]
    if family[-1].num_edges < total:
        family.append(Circuit.full(model.graph, ablation=ablation, output_bias=output_bias))
        kept.append(1.0)
    return family, np.array(kept)


def _checked_metric(name: str | None, question: Question) -> str:
    if name is None:
        return performance_metric(question).name
    (metric,) = choose([name], question)
    if not metric.of_model:
        own = [other.name for other in choose(None, question) if other.of_model]
        raise InputError(f"{name} compares a circuit with the model, which has none to recover; use {', '.join(own)}")
    return name


def _check_apart(nothing: float, whole: float, name: str, split: str) -> None:
    if nothing == whole:
        raise InputError(
            f"{name} is {whole:g} on the {split} split for model and empty circuit alike; faithfulness needs them to "
            "differ, give the task distractors"
        )


def _examples(reference: Reference, circuit: Circuit, name: str, task: Task) -> np.ndarray:
    return score_examples(reference, Masks.from_circuit(circuit), [name], task)[name]


def _recovered(means: np.ndarray) -> np.ndarray:
    """f of all but the first, from metrics of nothing, circuits, ..., the model."""
    return (means[1:] - means[0]) / (means[-1] - means[0])


def _areas(fractions: np.ndarray, recovered: np.ndarray) -> tuple[float, float]:
    return float(np.trapezoid(recovered, fractions)), float(np.trapezoid(np.abs(1 - recovered), fractions))


def _bounds(
    table: np.ndarray, fractions: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of both areas when examples are drawn with replacement, the same ones for every circuit."""
    check_bootstrap(resamples, confidence)
    generator, count = np.random.default_rng(seed), table.shape[1]
    drawn = [
        _areas(fractions, _recovered(np.nanmean(table[:, generator.integers(count, size=count)], axis=1)))
        for _ in range(resamples)
    ]
    low, high = np.nanquantile(np.array(drawn), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _area(value: Interval | float) -> dict[str, float] | float:
    return {"mean": value.mean, "low": value.low, "high": value.high} if isinstance(value, Interval) else value

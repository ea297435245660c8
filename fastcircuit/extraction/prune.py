"""``prune`` and ``sweep``: from a model and a task to the components that are enough for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from fastcircuit.errors import InputError
from fastcircuit.evaluation.bootstrap import Interval
from fastcircuit.extraction import greedy, reference
from fastcircuit.extraction.ablation import ablation_constants, equal_length
from fastcircuit.extraction.candidates import HEAD_ORDERS, Candidate, FloatError, Rule, layer_order
from fastcircuit.extraction.evaluator import Evaluator
from fastcircuit.extraction.path import OnCandidate, Path
from fastcircuit.extraction.score import score
from fastcircuit.extraction.size import Sizes
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.submodel.kept import Constants, Kept
from fastcircuit.tasks.task import Examples, Task

MODES = ("fast", "reference")
MOST_EXAMPLES = 250
SCALE_EXAMPLES = 32
THRESHOLD = 0.01
# The paper's: 30 from 1e-5 to 1, evenly spaced on a log scale.
THRESHOLDS = tuple(np.logspace(-5, 0, 30).tolist())
# Tried for a size budget; the last one removes whatever comes next, so that every size is reached.
SIZE_THRESHOLDS = (*np.logspace(-3, 0, 10).tolist(), 1e6)


@dataclass(frozen=True)
class Pruning:
    """What Algorithm 1 kept at one threshold.

    Args:
        kept: the components that stay.
        constants: what the others write instead.
        threshold: the largest change in KL at which a component was removed, in nats.
        kl: ``KL(original || pruned)`` on the validation prompts, in nats.
        size: fraction of the model's parameters that remain (see :class:`fastcircuit.extraction.size.Sizes`).
        history: every candidate in the order tested.
        near_ties: those of them that rounding alone could have decided otherwise.
        metrics: on the test split, each with its confidence interval (see :func:`fastcircuit.extraction.score.score`).
    """

    kept: Kept
    constants: Constants
    threshold: float
    kl: float
    size: float
    history: list[Candidate]
    near_ties: list[Candidate]
    metrics: dict[str, Interval]

    @property
    def is_empty(self) -> bool:
        """Whether no component is left at all."""
        return not (self.kept.heads.any() or self.kept.mlps.any())


@dataclass(frozen=True)
class Sweep:
    """One :class:`Pruning` per threshold, thresholds ascending."""

    points: list[Pruning]

    def select(self, kl_budget: float | None = None, size_budget: float | None = None) -> Pruning:
        """The smallest with a validation KL of at most ``kl_budget``, or the most faithful of size ``size_budget``.

        Empty ones are never chosen.

        Raises:
            InputError: not exactly one budget, or nothing is within it.
        """
        if (kl_budget is None) == (size_budget is None):
            raise InputError("give kl_budget or size_budget to select by, one of them")
        full = [point for point in self.points if not point.is_empty]
        if kl_budget is not None:
            within = [point for point in full if point.kl <= kl_budget]
            least = min((point.kl for point in full), default=float("nan"))
            if not within:
                raise InputError(f"no threshold reaches a KL of {kl_budget}; the least is {least:.4g}")
            return min(within, key=lambda point: (point.size, point.kl))
        within = [point for point in full if point.size <= (size_budget or 0)]
        if not within:
            least = min((point.size for point in full), default=float("nan"))
            raise InputError(
                f"no threshold tried reaches a size of {size_budget} with anything left; the least is {least:.3f}, "
                "give a larger size_budget, or no kl_budget"
            )
        return min(within, key=lambda point: (point.kl, point.size))


def prune(
    model: MaskedCausalLM | PreTrainedModel,
    task: Task,
    *,
    ablation: str = "mean",
    threshold: float | None = None,
    mode: str = "fast",
    head_order: str = "code",
    include_mlps: bool = True,
    kl_budget: float | None = None,
    size_budget: float | None = None,
    output_bias: str = "split",
    most_examples: int = MOST_EXAMPLES,
    seed: int = 0,
    on_candidate: OnCandidate | None = None,
) -> Pruning:
    """Remove every head and MLP that ``task`` can do without (Algorithm 1 of the circuit extraction paper).

    From the last layer to the first, a component is replaced by its constant and stays removed if
    ``KL(original || without it) - KL(original || so far) < threshold``, over the full vocabulary, averaged over each
    prompt's answer positions and then over prompts. The train split is divided at random into patching prompts (means)
    and validation prompts (KL); metrics are from the test split.

    Args:
        ablation: ``mean``, ``mean-positional`` or ``zero`` (see ``ablation_constants``).
        threshold: in nats; None: 0.01, or with a ``size_budget`` the one of several whose result has the least KL.
        mode: ``fast``, or ``reference`` (one full forward pass per candidate); both decide alike.
        head_order: ``code`` (heads ascending, as the paper's code) or ``paper`` (descending, as its pseudocode).
        include_mlps: whether MLPs are candidates too.
        kl_budget: a candidate is also refused if the total KL would not stay below this.
        size_budget: stop once this fraction of the parameters remains or less (see ``Sizes`` for what is counted); it
            is an error if more remains in the end.
        output_bias: under zero ablation, ``split`` or ``kept``.
        most_examples: prompts in each half of the train split, at most.
        seed: decides the halves and the bootstrap.
        on_candidate: called with the candidates decided so far and how many there are.

    Raises:
        InputError: bad arguments, a task that does not fit, weights that are not finite, or nothing left.
    """
    swept = sweep(
        model,
        task,
        _thresholds_to_try(threshold, size_budget),
        ablation=ablation,
        mode=mode,
        head_order=head_order,
        include_mlps=include_mlps,
        kl_budget=kl_budget,
        size_budget=size_budget,
        output_bias=output_bias,
        most_examples=most_examples,
        seed=seed,
        on_candidate=on_candidate,
    )
    if len(swept.points) > 1:
        return swept.select(size_budget=size_budget)
    _check_reached(swept.points[0], size_budget)
    return swept.points[0]


def _thresholds_to_try(threshold: float | None, size_budget: float | None) -> Sequence[float]:
    if threshold is None and size_budget is not None:
        return SIZE_THRESHOLDS
    return [THRESHOLD if threshold is None else threshold]


def _check_reached(pruning: Pruning, size_budget: float | None) -> None:
    if pruning.is_empty:
        largest = max(candidate.change for candidate in pruning.history)
        raise InputError(
            f"threshold {pruning.threshold:g} prunes every head and MLP; no removal costs more than {largest:.3g} "
            "nats, give a smaller threshold or a kl_budget"
        )
    if size_budget is not None and pruning.size > size_budget:
        raise InputError(
            f"threshold {pruning.threshold:g} ends at a size of {pruning.size:.3f}, above the size_budget of "
            f"{size_budget:g}; give a larger threshold, or none to have it chosen"
        )


def sweep(
    model: MaskedCausalLM | PreTrainedModel,
    task: Task,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    ablation: str = "mean",
    mode: str = "fast",
    head_order: str = "code",
    include_mlps: bool = True,
    kl_budget: float | None = None,
    size_budget: float | None = None,
    output_bias: str = "split",
    most_examples: int = MOST_EXAMPLES,
    seed: int = 0,
    on_candidate: OnCandidate | None = None,
) -> Sweep:
    """:func:`prune` at several thresholds, which share all they have in common; empty results are kept, not refused.

    The original model's streams and answers are computed once, and so is every pruned model that more than one
    threshold comes to: thresholds that decide alike down to some layer cost no more than one.
    """
    _check_choices({"mode": (mode, MODES), "head_order": (head_order, HEAD_ORDERS)})
    check_numbers(thresholds, kl_budget, size_budget, most_examples)
    model = model if isinstance(model, MaskedCausalLM) else MaskedCausalLM(model)
    task.check_vocabulary(model.config.vocab_size)
    patching, validation = halves(task, most_examples, seed)
    test = task.split("test")
    if ablation == "mean-positional":
        equal_length([patching, validation, test])
    constants = ablation_constants(model, patching, ablation, output_bias)
    order = layer_order(model.graph.num_heads, head_order, include_mlps)
    sizes = Sizes.of(model, 0 if ablation == "zero" else constants.mlps[0].numel())
    paths = [
        Path(
            rule=Rule(threshold, float("inf") if kl_budget is None else kl_budget),
            sizes=sizes,
            size_budget=0.0 if size_budget is None else size_budget,
            kept=reference.everything(model),
        )
        for threshold in sorted(thresholds)
    ]
    if mode == "fast":
        greedy.prune_paths(Evaluator(model, constants, validation), paths, order, on_candidate)
    else:
        reference.prune_paths(model, constants, validation, paths, order, on_candidate)
    error = float_error(model, constants, validation)
    metrics = score(model, constants, [path.kept for path in paths], test, task.answer_tokens, seed)
    return Sweep([_pruning(path, constants, error, row) for path, row in zip(paths, metrics, strict=True)])


def halves(task: Task, most_examples: int = MOST_EXAMPLES, seed: int = 0) -> tuple[Examples, Examples]:
    """Patching and validation prompts: two disjoint random halves of the train split, at most so many each.

    Raises:
        InputError: the train split has fewer than two examples.
    """
    train = task.split("train")
    size = min(most_examples, len(train) // 2)
    if size < 1:
        raise InputError(
            f"task {task.name} has {len(train)} train example; extraction needs at least 2, half of them for the "
            "means and half to measure on"
        )
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.select(shuffled[:size]), train.select(shuffled[size : 2 * size])


def float_error(model: MaskedCausalLM, constants: Constants, validation: Examples) -> FloatError:
    """What rounding may do to a KL of this model: ``eps * sqrt(2 L)`` of its largest log-probabilities."""
    log_probs = reference.pruned_log_probs(
        model, constants, reference.everything(model), validation.select(slice(SCALE_EXAMPLES))
    )
    scale = float(log_probs.abs().amax(1).mean())
    depth = (2 * model.graph.num_layers) ** 0.5
    return FloatError(torch.finfo(model.dtype).eps * depth * scale, torch.finfo(log_probs.dtype).eps * scale)


def _pruning(path: Path, constants: Constants, error: FloatError, metrics: dict[str, Interval]) -> Pruning:
    return Pruning(
        kept=path.kept,
        constants=constants,
        threshold=path.rule.threshold,
        kl=path.kl,
        size=path.sizes.fraction(path.kept),
        history=path.history,
        near_ties=[candidate for candidate in path.history if error.is_tie(candidate)],
        metrics=metrics,
    )


def _check_choices(choices: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for name, (value, accepted) in choices.items():
        if value not in accepted:
            raise InputError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")


def check_numbers(
    thresholds: Sequence[float],
    kl_budget: float | None,
    size_budget: float | None,
    most_examples: int = MOST_EXAMPLES,
) -> None:
    """InputError for a number that :func:`sweep` cannot use."""
    if not thresholds:
        raise InputError("no thresholds; give at least one")
    for name, value in [*(("threshold", value) for value in thresholds), ("kl_budget", kl_budget)]:
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}; give a finite number of nats above 0")
    if size_budget is not None and not 0 < size_budget < 1:
        raise InputError(f"size_budget is {size_budget}; give the fraction of parameters to keep, between 0 and 1")
    if most_examples < 1:
        raise InputError(f"most_examples is {most_examples}; give at least 1")

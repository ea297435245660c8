"""How time and memory grow: each case is a curve, its variants the points, timed in turns.

The exponent that is fitted to a curve must lie in the case's ``exponents``. Linear is 1 +- TOLERANCE: a point's fixed
costs lower it, and operands that outgrow a cache raise it. Against layers a step may grow as its counted products do,
of which only the edges' reads are quadratic. Against sparsity its time must fall.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.benchmarks.curves import steepness
from fastcircuit.benchmarks.models import Shape
from fastcircuit.benchmarks.suites import ops, step
from fastcircuit.benchmarks.suites.extraction import opinionated
from fastcircuit.discovery.edge_pruning import EdgePruning

TOLERANCE = 0.4
LINEAR = (1 - TOLERANCE, 1 + TOLERANCE)
SUBLINEAR = (-TOLERANCE, 1 + TOLERANCE)
NODES_OF_EDGES = 0.75  # writers removed per edge removed, as in the published runs (.72 at .97)
OFF = -10.0


def cases(target: Target) -> Iterator[Case]:
    read = ops.Shape(36, 64, 64 if target.quick else 256)
    few = 4 if target.quick else 5
    yield _read("writers", read, [16 * 2**i for i in range(few)], target)
    yield _read("readers", read, [9 * 2**i for i in range(few)], target)
    yield _read("tokens", read, [16 * 2**i for i in range(few)], target)
    small = Shape(layers=4, heads=8, width=256, vocabulary=4096, batch=4, tokens=32)
    if not target.quick:
        small = Shape(layers=6, vocabulary=4096, batch=4, tokens=32)
    points = 4 if target.quick else 5
    batches = {4 * 32 * 2**i: {"batch": 4 * 2**i} for i in range(points)}
    depths = {layers: {"layers": layers} for layers in ((2, 4, 8) if target.quick else (2, 4, 8, 12))}
    yield _step("tokens", small, batches, LINEAR, target)
    few_batches = dict(list(batches.items())[:3])  # it takes a minute for what comes after
    yield _step("tokens", small, few_batches, LINEAR, target, published=True)
    yield _step("layers", small, depths, _as_counted(small, depths), target)
    sparse = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
    yield _sparsity(small, sparse[::2] if target.quick else sparse, target)


def _read(axis: str, shape: ops.Shape, values: list[int], target: Target) -> Case:
    sizes = {"readers": shape.readers, "writers": shape.writers, "tokens": shape.tokens, "width": shape.width}
    sizes.pop(axis)
    shapes = {f"{value}": ops.Shape(**{**sizes, axis: value}) for value in values}
    return Case(
        suite="scaling",
        name="masked_read forward",
        shape=f"{axis}: " + ", ".join(f"{value} {name}" for name, value in sizes.items()),
        dtype="float32",
        device=target.device,
        setup=lambda: {
            name: ops.Operands(each, torch.float32, target.device, "forward") for name, each in shapes.items()
        },
        variants={name: functools.partial(_read_point, name) for name in shapes},
        axis=axis,
        exponents=SUBLINEAR if axis != "tokens" else LINEAR,
        counts_memory=axis != "tokens",  # the results of few tokens are smaller than what a process varies by
    )


def _read_point(name: str, operands: dict[str, ops.Operands]) -> Variant:
    return ops.variant(ops.FORWARD["fastcircuit"], operands[name])


def _step(
    axis: str,
    shape: Shape,
    points: dict[int, dict[str, int]],
    exponents: tuple[float, float],
    target: Target,
    published: bool = False,
) -> Case:
    shapes = {f"{value}": Shape(**{**_sizes(shape), **changes}) for value, changes in points.items()}
    make = step.published_step if published else step.fastcircuit_step
    return Case(
        suite="scaling",
        name="published training step" if published else "training step",
        shape=f"{axis}: {shape}",
        dtype="float32",
        device=target.device,
        setup=lambda: {
            name: step.Operands(each, target.device, published_truth=False) for name, each in shapes.items()
        },
        variants={name: functools.partial(_step_point, make, name) for name in shapes},
        axis=axis,
        exponents=exponents,
        counts_memory=True,
    )


def _as_counted(shape: Shape, points: dict[int, dict[str, int]]) -> tuple[float, float]:
    """At least linear, and at most as the step's products grow, of which the reads alone are quadratic in layers."""
    shapes = {float(x): Shape(**{**_sizes(shape), **changes}) for x, changes in points.items()}
    flops = {x: float(step.least_work(each).flops) for x, each in shapes.items()}
    steepest = steepness(flops)
    assert steepest is not None
    return 1 - TOLERANCE, steepest + TOLERANCE


def _sizes(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in Shape.__dataclass_fields__}


def _step_point(make: Callable[[step.Operands], Variant], name: str, operands: dict[str, step.Operands]) -> Variant:
    return make(operands[name])


def _sparsity(shape: Shape, sparsities: tuple[float, ...], target: Target) -> Case:
    return Case(
        suite="scaling",
        name="training step",
        shape=f"sparsity: {shape}",
        dtype="float32",
        device=target.device,
        setup=functools.partial(_opinionated, shape, target.device),
        variants={f"{value:g}": functools.partial(_sparse_point, value) for value in sparsities},
        axis="sparsity",
        falls=True,
        counts_memory=True,
    )


def _opinionated(shape: Shape, device: str) -> step.Operands:
    """Operands whose model has components that matter, so that one skipped by mistake shows (see the gate's masks)."""
    operands = step.Operands(shape, device)  # its truth is the published form's, which skips nothing
    opinionated(operands.model)
    return operands


STILL = 1e-30  # a learning rate at which masks stay as sparse as they are


def _sparse_point(sparsity: float, operands: step.Operands) -> Variant:
    """A step whose masks sample 0 for ``sparsity`` of the edges; writers are off in the published runs' proportion.

    The gate's masks are 0 where the run's are.
    """
    run = step.edge_pruning(operands, learning_rate=STILL)
    _turn_off(run, sparsity)
    edge, node = run.parameters.edge > 0, run.parameters.node > 0
    gate = operands.at(operands.edge * edge, operands.node * node)
    return Variant(run.step, functools.partial(gate.check, step.our_divergence(run)))


def _turn_off(run: EdgePruning, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values, share in ((run.parameters.edge, sparsity), (run.parameters.node, NODES_OF_EDGES * sparsity)):
            removed = torch.randperm(len(values), generator=generator)[: round(share * len(values))]
            values[removed.to(values.device)] = OFF

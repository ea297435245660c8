"""The operations: ours by backend, torch's best form of the same, and torch.compile of the plain form."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.benchmarks.case import Case, Target, Variant, Work
from fastcircuit.benchmarks.gate import problem
from fastcircuit.benchmarks.models import SHAPES, room
from fastcircuit.ops import masked_read, masked_read_backward_

GPT2_WRITERS = (26, 79, 157)
COLUMNS = 2**16  # of the operands at a time, when the truth is computed


@dataclass(frozen=True)
class Shape:
    """One read: R readers of W writers, T tokens of width d."""

    readers: int
    writers: int
    tokens: int = 512
    width: int = 768

    def __str__(self) -> str:
        return f"{self.readers} readers, {self.writers} writers, {self.tokens} x {self.width}"

    def flops(self, direction: str) -> int:
        products = 1 if direction == "forward" else 2
        return products * 2 * self.readers * self.writers * self.tokens * self.width

    def least_bytes(self, direction: str, itemsize: int) -> int:
        """Every operand touched once; in the backward the stream's gradient is read and written."""
        rows = self.writers + self.readers + 1 if direction == "forward" else self.readers + 3 * self.writers
        return rows * self.tokens * self.width * itemsize

    def fitted(self, itemsize: int, budget: int) -> "Shape":
        """With fewer tokens, a power of two, if the operands of both directions take more than ``budget`` bytes."""
        tokens = self.tokens
        while tokens > 1 and (2 * self.writers + 3 * self.readers) * tokens * self.width * itemsize > budget:
            tokens //= 2
        return Shape(self.readers, self.writers, tokens, self.width)


def shapes(target: Target) -> Iterator[tuple[str, Shape]]:
    """The attention read of a model's last layer, and of GPT-2 small early, midway and at the top."""
    for name, model in SHAPES.items():
        if target.quick and name not in ("stories260K", "GPT-2 small"):
            continue
        site = model.graph.attention_site(model.layers - 1)
        for writers in GPT2_WRITERS if name == "GPT-2 small" else (site.num_writers,):
            yield name, Shape(site.num_readers, writers, 320 if name == "stories260K" else 512, model.width)


def cases(target: Target) -> Iterator[Case]:
    budget = 2**28 if target.quick else room(target.device) // 4
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in shapes(target):
            if target.quick and dtype == torch.bfloat16 and shape.writers != GPT2_WRITERS[-1]:
                continue
            for direction in ("forward", "backward"):
                yield read_case(name, shape.fitted(dtype.itemsize, budget), direction, dtype, target)


def read_case(name: str, shape: Shape, direction: str, dtype: torch.dtype, target: Target) -> Case:
    """``masked_read`` in one direction: ours, ``torch.addmm``, the reference, and ``torch.compile``."""
    forms = FORWARD if direction == "forward" else BACKWARD
    chosen = {form: make for form, make in forms.items() if not (target.quick and form == "torch.compile")}
    return Case(
        suite="ops",
        name=f"masked_read {direction}",
        shape=f"{name}: {shape}",
        dtype=str(dtype).removeprefix("torch."),
        device=target.device,
        setup=functools.partial(Operands, shape, dtype, target.device, direction),
        variants={form: functools.partial(variant, make) for form, make in chosen.items()},
        baseline="torch.addmm",
        work=Work(shape.flops(direction), shape.least_bytes(direction, dtype.itemsize)),
    )


class Operands:
    """What the variants of a read share: stream ``[W, T, d]``, mask ``[R, W]``, base ``[T, d]``, gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, direction: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.tokens, shape.width)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.direction, self.dtype, self.shape = direction, dtype, shape
        self.stream = normal(shape.writers, *size)
        self.mask = torch.rand(shape.readers, shape.writers, generator=generator, device=device).to(dtype)
        if direction == "forward":
            self.base = normal(*size)
        else:
            self.grad_reads = normal(shape.readers, *size)
            self.grad_stream = torch.zeros_like(self.stream)

    def truth(self, first: int) -> list[tuple[Tensor, Tensor]]:
        """The results in float64 and what their rounding errors are relative to, for COLUMNS columns from ``first``.

        Of the backward's results only the stream's gradient has columns.
        """
        part = slice(first, first + COLUMNS)
        if self.direction == "forward":
            left, right, start = self.mask.double(), self.stream.flatten(1)[:, part], self.base.flatten()[part]
        else:
            left, right, start = self.mask.double().T, self.grad_reads.flatten(1)[:, part], None
        right = right.double()
        value, scale = left @ right, left.abs() @ right.abs()
        if start is not None:
            value, scale = value + start.double(), scale + start.double().abs()
        return [(value, scale)]

    def mask_gradient(self) -> tuple[Tensor, Tensor]:
        """``<grad_reads[r], stream[w]>`` in float64, and the sum of the absolute values of its terms."""
        grads, rows = self.grad_reads.flatten(1), self.stream.flatten(1)
        value = torch.zeros(len(grads), len(rows), dtype=torch.float64, device=rows.device)
        scale = value.clone()
        for first in range(0, rows.shape[1], COLUMNS):
            a, b = (x[:, first : first + COLUMNS].double() for x in (grads, rows))
            value += a @ b.T
            scale += a.abs() @ b.abs().T
        return value, scale


def variant(make: Callable[[Operands], Callable[[], Tensor]], operands: Operands) -> Variant:
    call = make(operands)
    if operands.direction == "backward":
        return Variant(call, functools.partial(_check_backward, operands, call))
    return Variant(call, functools.partial(_check_forward, operands, call, in_two_steps=make is _compiled))


def _check_forward(operands: Operands, call: Callable[[], Tensor], in_two_steps: bool) -> str | None:
    """``in_two_steps``: the product is rounded before the base is added, as torch's plain form does."""
    return _by_columns(operands, call().flatten(1), operands.shape.writers + 1, in_two_steps)


def _check_backward(operands: Operands, call: Callable[[], Tensor]) -> str | None:
    operands.grad_stream.zero_()
    mask_gradient = call()
    wrong = _by_columns(operands, operands.grad_stream.flatten(1), operands.shape.readers + 1)
    value, scale = operands.mask_gradient()
    terms = operands.shape.tokens * operands.shape.width
    return wrong or problem([(mask_gradient, value, scale)], terms, operands.dtype)


def _by_columns(operands: Operands, result: Tensor, terms: int, in_two_steps: bool = False) -> str | None:
    for first in range(0, result.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        ((value, scale),) = operands.truth(first)
        product = value - operands.base.flatten()[part].double() if in_two_steps else 0.0
        wrong = problem([(result[:, part], value, scale)], terms, operands.dtype, on_the_way=product)
        if wrong is not None:
            return wrong
    return None


def _ours(x: Operands) -> Callable[[], Tensor]:
    return lambda: masked_read(x.stream, x.mask, x.base)


def _addmm(x: Operands) -> Callable[[], Tensor]:
    start, rows = x.base.flatten().expand(len(x.mask), -1), x.stream.flatten(1)
    return lambda: torch.addmm(start, x.mask, rows).unflatten(1, x.base.shape)


def _plain(stream: Tensor, mask: Tensor, base: Tensor) -> Tensor:
    return base + torch.einsum("rw,wtd->rtd", mask, stream)


def _compiled(x: Operands) -> Callable[[], Tensor]:
    call = _compile(_plain)
    return lambda: call(x.stream, x.mask, x.base)


def _ours_backward(x: Operands) -> Callable[[], Tensor]:
    def call() -> Tensor:
        grad_mask = masked_read_backward_(x.grad_reads, x.stream, x.mask, x.grad_stream)
        assert grad_mask is not None
        return grad_mask

    return call


def _addmm_backward(x: Operands) -> Callable[[], Tensor]:
    grads, rows, totals = x.grad_reads.flatten(1), x.stream.flatten(1), x.grad_stream.flatten(1)

    def call() -> Tensor:
        totals.addmm_(x.mask.T, grads)
        return grads @ rows.T

    return call


def _plain_backward(grad_reads: Tensor, stream: Tensor, mask: Tensor, grad_stream: Tensor) -> Tensor:
    grad_stream += torch.einsum("rw,rtd->wtd", mask, grad_reads)
    return torch.einsum("rtd,wtd->rw", grad_reads, stream)


def _compiled_backward(x: Operands) -> Callable[[], Tensor]:
    call = _compile(_plain_backward)
    return lambda: call(x.grad_reads, x.stream, x.mask, x.grad_stream)


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()  # of one function only a few variants are compiled, and the others run eagerly
    return torch.compile(function, fullgraph=True, dynamic=False)


FORWARD = {"fastcircuit": _ours, "torch.addmm": _addmm, "torch.compile": _compiled}
BACKWARD = {"fastcircuit": _ours_backward, "torch.addmm": _addmm_backward, "torch.compile": _compiled_backward}

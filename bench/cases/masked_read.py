"""masked_read on GPT-2 small shapes: ours, the torch.addmm form, and torch.compile of the plain form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.ops import masked_read, masked_read_backward_


@dataclass(frozen=True)
class Shape:
    """One read: R readers of W writers, T tokens of width d."""

    readers: int
    writers: int
    tokens: int = 512
    width: int = 768

    @property
    def columns(self) -> int:
        return self.tokens * self.width

    def flops(self, direction: str) -> int:
        products = 1 if direction == "forward" else 2
        return products * 2 * self.readers * self.writers * self.columns

    def least_bytes(self, direction: str, itemsize: int) -> int:
        """What must move if every operand is touched once: the floor no implementation gets below."""
        # Backward: grad_reads and the stream are read, grad_stream is read and written.
        rows = self.writers + self.readers + 1 if direction == "forward" else self.readers + 3 * self.writers
        return rows * self.columns * itemsize


# Layers 2, 6 and 12 of GPT-2 small: the reads of 12 heads' q, k and v.
SHAPES = (Shape(36, 26), Shape(36, 79), Shape(36, 157))
FLOORS = {"forward": 2.5, "backward": 1.5}


def _plain(stream: Tensor, mask: Tensor, base: Tensor) -> Tensor:
    return base + torch.einsum("rw,wtd->rtd", mask, stream)


def _plain_backward(grad_reads: Tensor, stream: Tensor, mask: Tensor, grad_stream: Tensor) -> Tensor:
    grad_stream += torch.einsum("rw,rtd->wtd", mask, grad_reads)
    return torch.einsum("rtd,wtd->rw", grad_reads, stream)


def variants(shape: Shape, direction: str, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Tensor]]:
    """What is compared, as calls without arguments that share their operands."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(shape.writers, shape.tokens, shape.width, generator=generator).to(dtype)
    mask = torch.rand(shape.readers, shape.writers, generator=generator).to(dtype)
    rows = stream.flatten(1)
    if direction == "forward":
        base = torch.randn(shape.tokens, shape.width, generator=generator).to(dtype)
        start = base.flatten().expand(shape.readers, -1)
        compiled = torch.compile(_plain, fullgraph=True)
        return {
            "fastcircuit": lambda: masked_read(stream, mask, base),
            "torch.addmm": lambda: torch.addmm(start, mask, rows).view(shape.readers, shape.tokens, shape.width),
            "torch.compile": lambda: compiled(stream, mask, base),
        }
    grad_reads = torch.randn(shape.readers, shape.tokens, shape.width, generator=generator).to(dtype)
    grad_stream = torch.zeros_like(stream)
    compiled = torch.compile(_plain_backward, fullgraph=True)

    def addmm() -> Tensor:
        grad_stream.flatten(1).addmm_(mask.T, grad_reads.flatten(1))
        return grad_reads.flatten(1) @ rows.T

    return {
        "fastcircuit": lambda: masked_read_backward_(grad_reads, stream, mask, grad_stream),
        "torch.addmm": addmm,
        "torch.compile": lambda: compiled(grad_reads, stream, mask, grad_stream),
    }

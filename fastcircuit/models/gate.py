"""Products whose results are not all read, as the device alone knows: of all groups, or of those that are alive."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcircuit.ops import live_product, live_product_
from fastcircuit.ops.backends import is_compiled
from fastcircuit.ops.live_product import pays


@dataclass(frozen=True)
class Gate:
    """The groups of a product that are alive.

    Args:
        alive: int32 ``[G]``, 0 for groups whose result nothing reads.
        backend: which kernels to use.
        always: whether to leave out groups wherever a kernel can; None: where that pays.
    """

    alive: Tensor
    backend: str = "auto"
    always: bool | None = None

    def split(self, sizes: Sequence[int]) -> list["Gate"]:
        """Gates of consecutive groups; what is left over has none."""
        return [Gate(alive, self.backend, self.always) for alive in self.alive[: sum(sizes)].split(list(sizes))]

    def closes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether ``x`` ``[G, M, K]`` times ``weight`` ``[G, K, N]`` leaves out the groups that are not alive."""
        wanted = pays(x, weight) if self.always is None else self.always
        return wanted and is_compiled("live_product_", self.backend, x, weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate | None) -> Tensor:
    """``x[g] @ weight[g] + bias[g]``, ``[G, M, N]``, differentiable; what is left out, and its gradient, is anything.

    Args:
        bias: ``[G, 1, N]``, or None.
    """
    if gate is not None and gate.closes(x, weight):
        return live_product(x, weight, bias, gate.alive, zeros=False, backend=gate.backend)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def product_(out: Tensor, x: Tensor, weight: Tensor, gate: Gate | None, zeros: bool = False) -> None:
    """Write ``x[g] @ weight[g]`` into ``out`` ``[G, M, N]``; what is left out is 0 with ``zeros``, else as it was."""
    if gate is not None and gate.closes(x, weight):
        live_product_(out, x, weight, None, gate.alive, zeros=zeros, backend=gate.backend)
    else:
        torch.bmm(x, weight, out=out)

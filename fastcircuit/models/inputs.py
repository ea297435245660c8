"""What readers see: the stream through their masks, then a norm; and from the gradient of that to that of the reads.

There are two ways with one interface. Where one kernel reads and normalises, the reads are not kept: backward makes
them again from the stream, with the statistics that forward left. Elsewhere they are read, normalised, and kept.
"""

from dataclasses import dataclass, field

from torch import Tensor

from fastcircuit.models.anatomy import NoNorm, Norm
from fastcircuit.ops import read_norm, read_norm_grad


@dataclass
class KeptReads:
    """Reads that are kept for backward.

    Args:
        norm: of all reads but the last ``plain`` ones.
        reads: ``[readers, T, d]``; ``[1, T, d]`` when all readers see the same.
        plain: readers whose norm comes later, if there is one.
    """

    norm: Norm | NoNorm
    reads: Tensor
    plain: int = 0

    def forward(self) -> Tensor:
        """The normalised reads, ``[readers - plain, T, d]`` (or ``[1, T, d]``)."""
        return self.norm(self._normed)

    def rest(self) -> Tensor:
        """The plain reads, ``[plain, T, d]``; asked for once."""
        return self.reads[len(self.reads) - self.plain :]

    def backward_(self, grad: Tensor) -> Tensor:
        """The gradient of the reads ``[readers, T, d]``, in place of that of what forward and rest gave."""
        of_normed = grad[: len(grad) - self.plain]
        self.norm.backward_(of_normed, self._normed.expand_as(of_normed))
        return grad

    @property
    def _normed(self) -> Tensor:
        return self.reads[: len(self.reads) - self.plain]


@dataclass
class FusedReads:
    """Reads of ``stream`` ``[w, T, d]`` through ``weights`` ``[readers, w]``, normalised as they are made.

    Args:
        norm, plain: as in :class:`KeptReads`.
        live: writers with a mask that is not 0 (see :func:`fastcircuit.ops.live_writers`); None: all are read.
    """

    norm: Norm
    stream: Tensor
    weights: Tensor
    base: Tensor
    plain: int = 0
    live: Tensor | None = None
    backend: str = "auto"
    _stats: Tensor | None = field(init=False, default=None)
    _rest: Tensor | None = field(init=False, default=None)

    def forward(self) -> Tensor:
        """The normalised reads, ``[readers - plain, T, d]``."""
        norm = self.norm
        y, self._stats = read_norm(
            self.stream,
            self.weights,
            self.base,
            norm.weight,
            norm.bias,
            norm.eps,
            centered=norm.centered,
            plain=self.plain,
            live=self.live,
            backend=self.backend,
        )
        self._rest = y[len(y) - self.plain :] if self.plain else None
        return y[: len(y) - self.plain]

    def rest(self) -> Tensor:
        """The plain reads, ``[plain, T, d]``; asked for once, so that nothing keeps the others alive."""
        assert self._rest is not None
        rest, self._rest = self._rest, None
        return rest

    def backward_(self, grad: Tensor) -> Tensor:
        """The gradient of the reads, ``[readers, T, d]``, from that of what forward and rest gave."""
        assert self._stats is not None
        return read_norm_grad(
            grad,
            self._stats,
            self.stream,
            self.weights,
            self.base,
            self.norm.weight,
            centered=self.norm.centered,
            plain=self.plain,
            live=self.live,
            backend=self.backend,
        )


Inputs = KeptReads | FusedReads

"""What readers see: the stream through their masks, then a norm; and from the gradient of that to that of the reads.

There are two ways with one interface. Where one kernel reads and normalises, the reads are not kept: backward makes
them again from the stream, with the statistics that forward left. Elsewhere they are read and kept, and normalised on
their way into the projections where there is a kernel for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fastcircuit.models.anatomy import NoNorm, Norm, Projection
from fastcircuit.models.gate import Gate
from fastcircuit.ops import norm_projection, norm_projection_grad_, read_norm, read_norm_grad
from fastcircuit.ops.backends import is_compiled


@dataclass
class KeptReads:
    """Reads that are kept for backward.

    Args:
        norm: of all reads but the last ``plain`` ones.
        reads: ``[readers, T, d]``; ``[1, T, d]`` when all readers see the same.
        plain: readers whose norm comes later, if there is one.
        live: what was read (see :func:`fastcircuit.ops.live_writers`); None: everything.
        gate: the readers that are alive; None: all are.
        backend: which kernels to use.
    """

    norm: Norm | NoNorm
    reads: Tensor
    plain: int = 0
    live: Tensor | None = None
    gate: Gate | None = None
    backend: str = "auto"
    _fused: bool = field(init=False, default=False)

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

    def project(self, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
        """The projections of the normalised reads, ``[heads, T, d_head]`` each."""
        norm = self.norm
        self._fused = self._fuses(projections)
        if not self._fused:
            return _project(self.forward(), projections, self.gate)
        assert isinstance(norm, Norm)
        return tuple(
            norm_projection(x, norm.weight, norm.bias, norm.eps, to.weight, to.bias, centered=norm.centered)
            for x, to in _shares(self._normed, projections)
        )

    def project_backward(self, projections: Sequence[Projection], grads: Sequence[Tensor], grad: Tensor) -> Tensor:
        """``grad`` ``[readers, T, d]`` filled with the gradient of the reads; its plain rows are there already.

        Args:
            grads: of what project gave.
        """
        norm = self.norm
        if not self._fused:
            _project_backward(projections, grads, grad, self.gate)
            return self.backward_(grad)
        assert isinstance(norm, Norm)
        shares = zip(_shares(self._normed, projections), _shares(grad, projections), grads, strict=True)
        for (x, to), (out, _), of_projected in shares:
            norm_projection_grad_(of_projected, x, norm.weight, norm.eps, to.weight, out, centered=norm.centered)
        return grad

    def _fuses(self, projections: Sequence[Projection]) -> bool:
        """Whether each head sees something of its own, and one kernel normalises and projects it."""
        if not isinstance(self.norm, Norm) or self._normed.shape[0] == 1:
            return False
        return all(is_compiled("norm_projection", self.backend, self.reads, to.weight) for to in projections)

    @cached_property
    def _normed(self) -> Tensor:
        return self.reads[: self.reads.shape[0] - self.plain]


@dataclass
class FusedReads:
    """Reads of ``stream`` ``[w, T, d]`` through ``weights`` ``[readers, w]``, normalised as they are made.

    Args:
        norm, plain, gate, backend: as in :class:`KeptReads`.
        live: what is read (see :func:`fastcircuit.ops.live_writers`); None: everything.
    """

    norm: Norm
    stream: Tensor
    weights: Tensor
    base: Tensor
    plain: int = 0
    live: Tensor | None = None
    gate: Gate | None = None
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

    def project(self, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
        """As of :class:`KeptReads`."""
        return _project(self.forward(), projections, self.gate)

    def project_backward(self, projections: Sequence[Projection], grads: Sequence[Tensor], grad: Tensor) -> Tensor:
        """As of :class:`KeptReads`."""
        _project_backward(projections, grads, grad, self.gate)
        return self.backward_(grad)

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


def _shares(readers: Tensor, projections: Sequence[Projection]) -> list[tuple[Tensor, Projection]]:
    """Each projection with its own of the first readers."""
    heads = [projection.heads for projection in projections]
    return list(zip(readers[: sum(heads)].split(heads), projections, strict=True))


def _gates(gate: Gate | None, projections: Sequence[Projection]) -> Sequence[Gate | None]:
    """Each projection's own part of a gate of readers."""
    if gate is None:
        return [None] * len(projections)
    return gate.split([projection.heads for projection in projections])


def _project(normed: Tensor, projections: Sequence[Projection], gate: Gate | None) -> tuple[Tensor, ...]:
    """Per-head inputs ``[heads, T, d]``, or one for all, to ``[heads, T, d_head]`` of each of the projections."""
    gates = _gates(gate, projections)
    if normed.shape[0] == 1:
        return tuple(projection(normed, own) for projection, own in zip(projections, gates, strict=True))
    shares = zip(_shares(normed, projections), gates, strict=True)
    return tuple(projection(part, own) for (part, projection), own in shares)


def _project_backward(
    projections: Sequence[Projection], grads: Sequence[Tensor], grad: Tensor, gate: Gate | None
) -> None:
    """Write the gradient of what was projected into the first rows of ``grad``."""
    shares = zip(_shares(grad, projections), grads, _gates(gate, projections), strict=True)
    for (out, projection), of_projected, own in shares:
        projection.backward(of_projected, out, own)

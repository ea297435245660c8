"""Which implementation of an op runs: lazy loading, the reasons against one, and the automatic choice."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from fastcircuit.errors import InputError

_LAUNCHERS = {
    "reference": "fastcircuit.ops.reference",
    "cpu": "fastcircuit.ops.cpu",
    "triton": "fastcircuit.ops.triton",
}
BACKENDS = ("auto", *_LAUNCHERS)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


@functools.cache
def launcher(backend: str) -> ModuleType:
    """The module that launches ``backend``; each has ``missing_reason``, ``unsupported`` and the ops."""
    if backend not in _LAUNCHERS:
        raise InputError(f"backend: got {backend!r}; accepted are {', '.join(BACKENDS)}")
    return importlib.import_module(_LAUNCHERS[backend])


@functools.cache
def missing_reason(backend: str) -> str | None:
    """Why ``backend`` cannot be used on this machine at all, or None."""
    return launcher(backend).missing_reason()


def unsupported_reasons(op: str, backend: str, *tensors: Tensor | None) -> list[str]:
    """Why ``backend`` cannot run ``op`` on these tensors, given in the order of the op; empty if it can."""
    missing = missing_reason(backend)
    if missing:
        return [missing]
    if not hasattr(launcher(backend), op):
        return [f"it has no {op}"]
    return launcher(backend).unsupported(op, *tensors)


def choose(op: str, backend: str, *tensors: Tensor | None) -> Callable:
    """The function that runs ``op``: of ``backend`` by name, or for "auto" of the best one that can.

    Raises:
        InputError: ``backend`` is unknown, or was asked for by name and cannot run these tensors.
    """
    if backend == "auto":
        return getattr(_best(op, tensors), op)
    module = launcher(backend)
    reasons = unsupported_reasons(op, backend, *tensors)
    if reasons:
        raise InputError(f"{op}: backend {backend!r} cannot run this: {'; '.join(reasons)}. Use backend='auto'.")
    return getattr(module, op)


def is_compiled(op: str, backend: str, *tensors: Tensor | None) -> bool:
    """Whether ``op`` on these tensors is a kernel of its own, and not the plain torch of the specification."""
    if backend == "auto":
        return _best(op, tensors) is not launcher("reference")
    return backend != "reference" and not unsupported_reasons(op, backend, *tensors)


def _best(op: str, tensors: tuple[Tensor | None, ...]) -> ModuleType:
    first = tensors[0]
    assert first is not None
    for module in _usable(first.device.type):
        if hasattr(module, op) and not module.unsupported(op, *tensors):
            return module
    return launcher("reference")


@functools.cache
def _usable(device: str) -> tuple[ModuleType, ...]:
    return tuple(launcher(name) for name in _PREFERENCE.get(device, ()) if missing_reason(name) is None)


def available_backends() -> dict[str, str | None]:
    """Every backend and why it cannot be used on this machine (None: it can)."""
    return {name: missing_reason(name) for name in _LAUNCHERS}

"""The compiled extension: whether it is there, and which of its instruction sets its kernels are to use."""

import functools
import os
from importlib import resources
from typing import Any

import torch  # first on purpose: its OpenMP runtime then serves the extension too, and there is one pool

from fastcircuit.errors import InputError

try:
    from fastcircuit import _C  # type: ignore[attr-defined]

    kernels: Any = _C
    _import_error: ImportError | None = None
except ImportError as error:
    kernels = None
    _import_error = error

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def build_note() -> str:
    """What the build found missing (no compiler, no OpenMP), or an empty string."""
    note = resources.files("fastcircuit").joinpath("build_note.txt")
    return note.read_text().strip() if note.is_file() else ""


def missing_reason() -> str | None:
    """Why the extension cannot be used on this machine, or None."""
    if kernels is not None:
        return None
    why = build_note() or f"it was not built or does not load ({_import_error})"
    return f"the C++ extension fastcircuit._C is missing: {why}. Install a C++17 compiler and reinstall fastcircuit"


def runnable_isas() -> list[str]:
    """The instruction sets the extension can use on this machine, slowest first."""
    return kernels.runnable_isas() if kernels is not None else []


def instruction_sets() -> dict[str, str | None]:
    """Why the extension cannot use an instruction set here, or None; the last one it can use is what it uses.

    ``avx512_bf16`` and ``amx`` are bfloat16 ``masked_read`` with products of pairs, and on matrix tiles; everything
    else then runs on ``avx512``.
    """
    why = missing_reason() or "the compiler that built the extension, the processor or the operating system lacks it"
    runnable = runnable_isas()
    return {name: None if name in runnable else why for name in ISAS}


def _choose_isa() -> int:
    runnable = runnable_isas()
    name = os.environ.get("FASTCIRCUIT_ISA") or (runnable[-1] if runnable else "portable")
    if runnable and name not in runnable:
        raise InputError(f"FASTCIRCUIT_ISA: got {name!r}; this machine can run {', '.join(runnable)}")
    return ISAS.index(name)


_isa = _choose_isa()


def isa() -> int:
    """The number of the instruction set that kernels are to use."""
    return _isa


@functools.cache
def _is_intel() -> bool:
    return kernels is None or kernels.is_intel()


def outruns_mkl() -> bool:
    """Whether products of our own run on AVX-512 where torch's MKL does not: it does only on Intel's processors."""
    return _isa >= ISAS.index("avx512") and torch.backends.mkl.is_available() and not _is_intel()


def force_isa(name: str | None) -> None:
    """Use this instruction set from now on (None: the best one, or $FASTCIRCUIT_ISA). For tests and benchmarks."""
    global _isa
    if name is not None and name not in runnable_isas():
        raise InputError(f"isa: got {name!r}; this machine can run {', '.join(runnable_isas())}")
    _isa = _choose_isa() if name is None else ISAS.index(name)

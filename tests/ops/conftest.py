"""What every op is tested under: each backend and instruction set, with fresh memory poisoned."""

import os

import pytest
import torch

from fastcircuit.ops import available_backends, extension


def usable_backends() -> list[str]:
    """Those that run on the CPU: Triton's kernels do in its interpreter (on a GPU, tests/test_gpu.py runs them)."""
    usable = [name for name, why in available_backends().items() if why is None]
    return usable if os.environ.get("TRITON_INTERPRET") == "1" else [name for name in usable if name != "triton"]


def _variants() -> list[tuple[str, str | None]]:
    return [(name, None) for name in usable_backends() if name != "cpu"] + [
        ("cpu", isa) for isa in extension.runnable_isas()
    ]


@pytest.fixture(params=_variants(), ids=lambda v: f"{v[0]}-{v[1]}" if v[1] else v[0])
def backend(request):
    name, isa = request.param
    if name != "cpu":
        yield name
        return
    extension.force_isa(isa)
    yield name
    extension.force_isa(None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors are NaN, so a kernel that leaves a number unwritten is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

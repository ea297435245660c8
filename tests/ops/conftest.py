"""What every op is tested under: each backend and instruction set, with fresh memory poisoned."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastcircuit.ops import available_backends
from fastcircuit.ops import cpu as cpu_launcher

# A checkout that is not installed has kernels/ under its own name only.
if importlib.util.find_spec("fastcircuit_kernels") is None:
    package = ModuleType("fastcircuit_kernels")
    package.__path__ = [str(Path(__file__).parents[2] / "kernels")]
    package.__spec__ = importlib.util.spec_from_loader("fastcircuit_kernels", loader=None, is_package=True)
    sys.modules["fastcircuit_kernels"] = package


def _variants() -> list[tuple[str, str | None]]:
    usable = [name for name, why in available_backends().items() if why is None and name != "cpu"]
    return [(name, None) for name in usable] + [("cpu", isa) for isa in cpu_launcher.runnable_isas()]


@pytest.fixture(params=_variants(), ids=lambda v: f"{v[0]}-{v[1]}" if v[1] else v[0])
def backend(request):
    name, isa = request.param
    if name != "cpu":
        yield name
        return
    cpu_launcher.force_isa(isa)
    yield name
    cpu_launcher.force_isa(None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors are NaN, so a kernel that leaves a number unwritten is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

"""What this installation has: versions, devices, kernel backends, shipped models and tasks."""

import platform
from importlib import metadata
from typing import Any

import torch

from fastcircuit import tasks, zoo
from fastcircuit.models.masked import ARCHITECTURES
from fastcircuit.ops.backends import available_backends
from fastcircuit.ops.extension import instruction_sets

_PACKAGES = ("fastcircuit", "torch", "transformers", "triton", "safetensors", "numpy")


def system_info() -> dict[str, Any]:
    """Versions, devices, what can be named on the command line; of backends and the CPU kernels' instruction sets
    ``None`` or why one is missing.
    """
    devices = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    devices += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": devices,
        "backends": available_backends(),
        "instruction_sets": instruction_sets(),
        "architectures": list(ARCHITECTURES),
        "models": zoo.names(),
        "tasks": tasks.names(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

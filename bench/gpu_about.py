"""What a number from a GPU has to come with: device, driver, torch's CUDA, Triton."""

import subprocess
from importlib import metadata
from typing import Any

import torch


def gpu_about() -> dict[str, Any]:
    """Columns for the rows of a GPU benchmark, beside those of :func:`bench.results.record`."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": _driver() if cuda else "",
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

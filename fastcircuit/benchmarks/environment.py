"""Where and with what a measurement was made."""

import datetime
import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastcircuit.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx512_vnni", "amx_bf16", "asimd", "sve")


def environment(device: str) -> dict[str, Any]:
    """Device, CPU flags, threads, driver, versions, commit and date, as the columns of a row."""
    return {
        "device": device_name(device),
        "cpu_flags": " ".join(_cpu_flags()),
        "threads": torch.get_num_threads(),
        "driver": _driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def device_name(device: str) -> str:
    """ "cpu Intel(R) Xeon(R) ..., 2 cores" or "cuda NVIDIA H200"."""
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name(0)}"
    return f"cpu {_cpu_model()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name.lower()))).strip("-")


@functools.cache
def commit() -> str:
    """The checkout's commit, with "-dirty" when files other than results are changed; without git, the version."""
    if not (ROOT / "pyproject.toml").is_file():
        return f"v{_version('fastcircuit')}"
    short = _git("rev-parse", "--short", "HEAD")
    if not short:
        return f"v{_version('fastcircuit')}"
    return f"{short}-dirty" if changed() else short


def changed() -> list[str]:
    """Files of the checkout that differ from its commit, other than results."""
    lines = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results").splitlines()
    return [line.split(maxsplit=1)[-1] for line in lines]


def check_committed(results: Path) -> None:
    """Rows that the repository keeps are of a commit.

    Raises:
        InputError: ``results`` lies in the checkout, where git does not ignore it, and other files are changed.
    """
    if not results.resolve().is_relative_to(ROOT) or not (files := changed()):
        return
    if not _git("check-ignore", str(results.resolve() / "DEVICE.csv")):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise InputError(
            f"rows in {results} are of a commit, and {files[0]}{more} differs from it; commit first, or name another "
            "directory with --results"
        )


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_field(name: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
    except OSError:
        return ""


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [flag for flag in _FLAGS if flag in present] or [torch.backends.cpu.get_cpu_capability().lower()]


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""

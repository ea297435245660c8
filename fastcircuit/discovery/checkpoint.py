"""Checkpoints of a run: one safetensors file, written whole, that resumes to the identical result."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastcircuit.errors import InputError
from fastcircuit.files import write_atomically

FORMAT = "fastcircuit.checkpoint/1"


def save_checkpoint(
    path: str | os.PathLike[str],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: Tensor,
    about: dict[str, Any],
) -> None:
    """Write parameters, optimizer state and history; ``about`` says what run this is and must match on resuming."""
    tensors = {f"parameter.{name}": value.detach() for name, value in module.named_parameters()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    tensors["history"] = history
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "about": json.dumps(about, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_checkpoint(
    path: str | os.PathLike[str], module: torch.nn.Module, optimizer: torch.optim.Optimizer, about: dict[str, Any]
) -> Tensor:
    """Restore what :func:`save_checkpoint` wrote, in place; returns the history.

    Raises:
        InputError: the file is damaged, or it is of a run with other settings (the first difference is named).
    """
    tensors, found = _read(Path(path))
    for name in sorted(set(found) | set(about)):
        if found.get(name) != json.loads(json.dumps(about.get(name))):
            raise InputError(
                f"checkpoint {path} is of another run: its {name} is {found.get(name)!r}, "
                f"this run's is {about.get(name)!r}; repeat its model, pairs and settings, or choose another --out"
            )
    try:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"parameter.{name}"])
        _restore_optimizer(optimizer, tensors)
        return tensors["history"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); delete it to start anew") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(
                    f"{path} is not a checkpoint: its format is {metadata.get('format')!r}, not {FORMAT!r}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["about"])  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path} to resume from; run without --resume") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); delete it to start anew") from error


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

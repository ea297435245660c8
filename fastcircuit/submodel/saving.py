"""A submodel as a directory: written whole or not at all, and read with one clear line when something is wrong."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastcircuit.errors import InputError
from fastcircuit.files import write_directory, write_text
from fastcircuit.models.loading import DTYPES, REPORTING, check_all_loaded, locate, quiet, reason_of
from fastcircuit.models.masked import first_line
from fastcircuit.submodel.configuration_circuit import CircuitConfig
from fastcircuit.submodel.modeling_circuit import CircuitForCausalLM


def save_submodel(
    model: CircuitForCausalLM, directory: str | os.PathLike[str], *, tokenizer: Any = None, card: str | None = None
) -> None:
    """Write a directory that ``AutoModelForCausalLM.from_pretrained`` loads.

    It holds safetensors, configs, the tokenizer, the card as README.md, and the two Python files that
    ``trust_remote_code=True`` needs to load it where fastcircuit is not installed.

    Raises:
        InputError: ``directory`` exists, or a weight is NaN or infinite. RunError: it cannot be written.
    """
    _check_finite(model, "the submodel")

    def write(temporary: Path) -> None:
        with quiet():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        if card is not None:
            write_text(temporary / "README.md", card)

    write_directory(directory, write)


def load_submodel(directory: str | os.PathLike[str], device: str = "cpu", dtype: str | None = None) -> Any:
    """The submodel saved in ``directory``, in eval mode, every weight of it from the file.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float64``; None: as saved.

    Raises:
        InputError: no such directory, no submodel in it, or weights that are damaged, foreign or not finite.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    name = os.fspath(directory)
    path = locate(name)
    if not Path(path).is_dir():
        raise InputError(f"no such directory: {name}; name one that `fastcircuit extract` wrote")
    _check_is_submodel(Path(path), name)
    try:
        with quiet():
            loaded: Any = CircuitForCausalLM.from_pretrained(
                path, dtype="auto" if dtype is None else DTYPES[dtype], local_files_only=True, **REPORTING
            )
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"cannot load submodel {name!r}: {reason_of(error)}") from error
    model, report = loaded
    check_all_loaded(report, f"submodel {name!r}")
    foreign = report["unexpected_keys"]
    if foreign:
        raise InputError(f"submodel {name!r}: {len(foreign)} weight(s) are of another model, such as {min(foreign)}")
    _check_finite(model, f"submodel {name!r}")
    return model.to(device).eval()


def _check_is_submodel(path: Path, name: str) -> None:
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read {name}/config.json: {first_line(error)}") from error
    if kind != CircuitConfig.model_type:
        raise InputError(f"{name} holds a model of type {kind!r}, not a submodel; make one with `fastcircuit extract`")


def _check_finite(model: CircuitForCausalLM, what: str) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"{what}: weight {name} holds NaN or infinity; extract it again, or mend the file")

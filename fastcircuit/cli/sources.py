"""The model and the task that a command is about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcircuit.cli.console import stderr
from fastcircuit.cli.options import Device, Dtype, EmbeddingNodes
from fastcircuit.errors import InputError


def load_model(name: str, device: Device, dtype: Dtype, embedding_nodes: EmbeddingNodes) -> Any:
    """The masked model of that name (see :func:`fastcircuit.models.loading.load_model`)."""
    from fastcircuit.models import loading

    return loading.load_model(name, device.value, dtype.value, embedding_nodes.value)


def check_circuit(where: Path, circuit: Any, model: str, masked: Any) -> None:
    """InputError unless the circuit fits the model; a line on stderr when it was found in one of another name."""
    from fastcircuit.evaluation.faithfulness import check_circuit_fits

    try:
        check_circuit_fits(masked, circuit)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    found_in = circuit.model.get("name")
    if found_in is not None and _place(str(found_in)) != _place(model):
        stderr.print(
            f"warning: {where} was found in {found_in}, and is run on {model}; unless their weights are the same, this "
            "says nothing about the circuit",
            markup=False,
            soft_wrap=True,
        )


def _place(name: str) -> str:
    """A shipped model or hub id as it is, a directory the same however its path is written."""
    from fastcircuit import zoo

    return str(Path(name).resolve()) if name not in zoo.names() and Path(name).is_dir() else name


def check_source(task: str | None, data: Path | None) -> None:
    """InputError unless there is one task or one file; before a model is loaded."""
    from fastcircuit.tasks import names

    known = ", ".join(names())
    if (task is None) == (data is None):
        raise InputError(f"say what to explain: --task NAME ({known}) or --data PAIRS.jsonl, one of them")
    if task is not None and task not in names():
        raise InputError(f"no task {task!r}; tasks: {known}; or give a file of your own with --data PAIRS.jsonl")
    if data is not None and not data.is_file():
        what = "is no file" if data.exists() else "does not exist"
        raise InputError(f"data file {data} {what}; name a JSONL or CSV file of pairs")


def load_task(
    model: str, masked: Any, task: str | None, data: Path | None, seed: int, sizes: Mapping[str, int] | None = None
) -> Any:
    """The task by name or from a file, in the tokens of ``model``, and known to the vocabulary of ``masked``."""
    from fastcircuit import tasks
    from fastcircuit.models.loading import load_tokenizer

    pairs = tasks.load_task(task or f"{data}", load_tokenizer(model), seed=seed, sizes=sizes)
    pairs.check_vocabulary(masked.config.vocab_size)
    return pairs

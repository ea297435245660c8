"""Scores of edges and writers as safetensors: a discovery's ``masks.safetensors``, or beside a converted circuit."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastcircuit.errors import InputError
from fastcircuit.files import write_atomically


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """What such a file holds.

    Args:
        edge: float64 ``[num_edges]``, in the order of the graph's edges.
        node: float64 ``[num_writers]``; None: the file has scores of edges alone.
        log_alpha: they are Edge Pruning's log-alphas, of which the lowest are removed first, not the smallest.
        seconds: that computing them took, if that is known.
    """

    edge: np.ndarray
    node: np.ndarray | None = None
    log_alpha: bool = False
    seconds: float | None = None


def ranked(scores: np.ndarray, absolute: bool, log_alpha: bool) -> np.ndarray:
    """What scores are ordered by: their size, or (not ``absolute``, and always log-alphas) the scores themselves."""
    return np.abs(scores) if absolute and not log_alpha else scores


def best(ranking: np.ndarray, count: int) -> np.ndarray:
    """Bool, True for the ``count`` that rank highest; of those alike, the first."""
    keep = np.zeros(len(ranking), dtype=bool)
    keep[np.argsort(-ranking, kind="stable")[:count]] = True
    return keep


def beside(circuit: str | os.PathLike[str]) -> Path:
    """``masks.safetensors`` for ``circuit.json``, and ``NAME.masks.safetensors`` for another ``NAME.json[.gz]``."""
    path = Path(circuit)
    name = path.name.removesuffix(".gz").removesuffix(".json")
    return path.with_name("masks.safetensors" if name == "circuit" else f"{name}.masks.safetensors")


def load(path: str | os.PathLike[str]) -> ScoreFile:
    """Read the scores in ``path``; InputError when there is no such file, or no scores are in it."""
    if not Path(path).is_file():
        raise InputError(f"scores file {path} does not exist; name one that does")
    try:
        with safe_open(path, "pt") as file:
            names, about = file.keys(), file.metadata() or {}
            edge = file.get_tensor("edge").double().numpy()
            node = file.get_tensor("node").double().numpy() if "node" in names else None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"scores file {path} cannot be read: {error}; it needs a tensor edge, and may have a tensor node"
        ) from None
    log_alpha = about.get("columns", "").startswith("step,") or about.get("log_alpha") == "true"
    return ScoreFile(edge, node, log_alpha, float(about["seconds"]) if "seconds" in about else None)


def save(path: str | os.PathLike[str], scores: ScoreFile) -> None:
    """Write ``edge`` and, where there are any, ``node``."""
    arrays = {"edge": scores.edge, "node": scores.node}
    tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items() if value is not None}
    about = {"format": "fastcircuit.scores/1"}
    about |= {"log_alpha": "true"} if scores.log_alpha else {}
    about |= {} if scores.seconds is None else {"seconds": repr(scores.seconds)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))

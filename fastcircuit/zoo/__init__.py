"""Small real models shipped with the package: complete Hugging Face directories that load offline.

``stories260K`` is a Llama that writes children's stories; ``induction-gpt2`` is a GPT-2 that continues repeated letter
patterns; ``tracr-reverse`` and ``tracr-xproportion`` are programs compiled to transformers, whose circuits are known.
Each directory carries its licence and a README saying where the weights come from.
"""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(config.parent.name for config in _ROOT.glob("*/config.json"))


def path(name: str) -> Path | None:
    """The directory of the shipped model ``name``, or None when there is no such model."""
    return _ROOT / name if name in names() else None


def resolve(model: str | os.PathLike[str]) -> str:
    """What to give ``from_pretrained``: the directory of a zoo model, anything else (id or directory) unchanged.

    A zoo name wins over a local directory of the same name; write ``./stories260K`` for the local one.
    """
    name = os.fspath(model)
    return str(path(name) or name)

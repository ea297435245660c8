"""Find circuits in transformers and turn them into small, fast models.

The names below load what they need on first use, so that ``import fastcircuit`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastcircuit.submodel.registration import register as _register_submodels

if TYPE_CHECKING:
    from fastcircuit.circuit import Circuit
    from fastcircuit.discovery import BaselineSettings, Discovery, Scores, Settings, attribute, discover
    from fastcircuit.errors import InputError, RunError
    from fastcircuit.evaluation.faithfulness import evaluate
    from fastcircuit.extraction.extract import extract
    from fastcircuit.graph import Graph
    from fastcircuit.masks import Masks
    from fastcircuit.models.masked import MaskedCausalLM
    from fastcircuit.report import draw
    from fastcircuit.tasks import load_task

__version__ = "0.1.0"
__all__ = [
    "BaselineSettings",
    "Circuit",
    "Discovery",
    "Graph",
    "InputError",
    "MaskedCausalLM",
    "Masks",
    "RunError",
    "Scores",
    "Settings",
    "attribute",
    "discover",
    "draw",
    "evaluate",
    "extract",
    "load_task",
]

_HOMES = {
    "BaselineSettings": "discovery",
    "Circuit": "circuit",
    "Discovery": "discovery",
    "Graph": "graph",
    "InputError": "errors",
    "MaskedCausalLM": "models.masked",
    "Masks": "masks",
    "RunError": "errors",
    "Scores": "discovery",
    "Settings": "discovery",
    "attribute": "discovery",
    "discover": "discovery",
    "draw": "report",
    "evaluate": "evaluation.faithfulness",
    "extract": "extraction.extract",
    "load_task": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcircuit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastcircuit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_register_submodels()

"""How many parameters a model has, with and without its embeddings."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """Parameters: all of them, and those that are no token or position embedding and no unembedding."""

    total: int
    blocks: int


def size_of(model: Any) -> Size:
    """The size of a Hugging Face decoder; weights that are shared count once."""
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings(), _positions(model)]
    outside = {id(parameter) for module in embeddings if module is not None for parameter in module.parameters()}
    total = sum(parameters.values())
    return Size(total, total - sum(parameters[key] for key in outside))


def _positions(model: Any) -> Any:
    """The table of learned positions, if the model has one."""
    body = model.base_model
    return getattr(body, "wpe", None) or getattr(body, "embed_positions", None)

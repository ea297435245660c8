"""Models and tokenizers by name, with one clear line when that fails."""

from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from fastcircuit import zoo
from fastcircuit.errors import InputError
from fastcircuit.graph import EmbeddingNodes
from fastcircuit.models.masked import MaskedCausalLM, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(
    name: str, device: str = "auto", dtype: str = "float32", embedding_nodes: EmbeddingNodes = "split"
) -> MaskedCausalLM:
    """A masked model by Hugging Face id, directory or zoo name, on ``device`` (``auto``: a GPU when there is one).

    Raises:
        InputError: no such model or device, an unsupported architecture, or weights that are not finite.
    """
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda is not available here (`fastcircuit info` lists what is); use --device cpu")
    model = MaskedCausalLM.from_pretrained(name, embedding_nodes=embedding_nodes, dtype=DTYPES[dtype])
    for parameter_name, parameter in model.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"model {name!r}: weight {parameter_name} holds NaN or infinity; mend or re-download the file"
            )
    model.model.to(device)
    return model


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model; InputError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(zoo.resolve(name))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error

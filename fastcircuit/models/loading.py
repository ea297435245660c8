"""Models and tokenizers by name, with one clear line when that fails."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastcircuit import zoo
from fastcircuit.errors import InputError
from fastcircuit.graph import EmbeddingNodes
from fastcircuit.models.masked import MaskedCausalLM, check_supported, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Weights that do not fit are listed in Hugging Face's report, instead of in its log.
REPORTING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")


def load_model(
    name: str, device: str = "auto", dtype: str = "float32", embedding_nodes: EmbeddingNodes = "split"
) -> MaskedCausalLM:
    """A masked model by Hugging Face id, directory or zoo name, on ``device`` (``auto``: a GPU when there is one).

    Raises:
        InputError: no such model or device, an unsupported architecture, weights that are missing or not finite.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    device = choose_device(device)
    masked = MaskedCausalLM(read_model(name, dtype=DTYPES[dtype]).to(device), embedding_nodes)
    masked.name = name  # not the directory a shipped model lies in here
    return masked


def load_config(name: str) -> Any:
    """A model's Hugging Face config alone; InputError when there is none or it is unsupported."""
    path = locate(name)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"cannot load the config of {name!r}: {first_line(error)}") from error
    check_supported(config)
    return config


def shapes_of_model(name: str, dtype: str = "float32", embedding_nodes: EmbeddingNodes = "split") -> MaskedCausalLM:
    """The masked model of that name on the meta device, from its configuration alone: shapes, no weights.

    Raises:
        InputError: no such model, an unsupported architecture.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    path = locate(name)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(path)
            check_supported(config)
            model = AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    except InputError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"cannot load model {name!r}: {first_line(error)}{_elsewhere(path)}") from error
    return MaskedCausalLM(model, embedding_nodes)


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is a GPU when there is one. InputError when there is none and it was asked for."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda is not available here (`fastcircuit info` lists what is); use --device cpu")
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model; InputError when there is none."""
    path = locate(name)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error


def read_model(name: str, **kwargs: Any) -> Any:
    """The Hugging Face model, every weight of it from the file and finite; ``kwargs`` go to ``from_pretrained``.

    Raises:
        InputError: no such model, an unsupported architecture, weights that are missing or not finite.
    """
    path = locate(name)
    try:
        with quiet():
            check_supported(AutoConfig.from_pretrained(path))
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, **kwargs, **REPORTING)
    except InputError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"cannot load model {name!r}: {reason_of(error)}{_elsewhere(path)}") from error
    model, report = loaded
    check_all_loaded(report, f"model {name!r}")
    _check_all_used(report, model, f"model {name!r}")
    _check_finite(model, f"model {name!r}")
    return model


def check_all_loaded(report: Mapping[str, Any], what: str) -> None:
    """InputError unless every weight of a model was in its file and fitted; ``report`` is Hugging Face's."""
    misfits = sorted(report["mismatched_keys"])
    if misfits:
        key, found, needed = misfits[0]
        raise InputError(
            f"{what}: {len(misfits)} weight(s) in its file are not of the shape that its config.json says, such as "
            f"{key}: {list(found)} instead of {list(needed)}; bring the two files of one model together"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{what}: {len(missing)} weight(s) are not in its file, such as {missing[0]}")


def _check_all_used(report: Mapping[str, Any], model: torch.nn.Module, what: str) -> None:
    """InputError when blocks have weights in the file that the model has no place for: it would compute another thing.

    Weights outside of the blocks (another head on top) and buffers that old files hold do no harm.
    """
    modules = model.named_modules()
    stacks = {name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.ModuleList)}
    foreign = sorted(
        key
        for key in report["unexpected_keys"]
        if key.endswith((".weight", ".bias")) and any(f".{stack}." in f".{key}" for stack in stacks)
    )
    if foreign:
        raise InputError(
            f"{what}: {len(foreign)} weight(s) in its file have no place in the model that its config.json says, such "
            f"as {foreign[0]}; bring the two files of one model together"
        )


def _check_finite(model: torch.nn.Module, what: str) -> None:
    """InputError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"{what}: weight {name} holds NaN or infinity; mend or re-download the file")


def reason_of(error: Exception) -> str:
    """Why loading failed, in one line."""
    if isinstance(error, SafetensorError):
        return f"its safetensors file is damaged or cut short ({first_line(error)}); copy it again"
    return first_line(error)


def _elsewhere(path: str) -> str:
    """Where else a model that is no directory may come from."""
    if Path(path).is_dir():
        return ""
    return f" Accepted: a shipped model ({', '.join(zoo.names())}), a directory, or a name on the Hugging Face hub"


def locate(name: str) -> str:
    """The directory of a model, or its hub id; InputError, without asking the hub, when a path leads to no model."""
    path = Path(zoo.resolve(name)).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is no model directory: there is no config.json in it")
        return str(path)
    if path.exists():
        raise InputError(f"{name} is a file; name the directory that holds the model's config.json and weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in _FILE_SUFFIXES:
        raise InputError(f"no such model directory: {name}")
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, warnings and log lines of the libraries: what is wrong is said once, in our words."""
    loggers = (transformers.logging, huggingface_hub.logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    bars = transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()

"""Submodels load with the Auto classes of Hugging Face once fastcircuit is imported, which still imports no torch.

``AutoConfig`` is told of the configuration as soon as both are there; the other Auto classes are told of the models
when the first configuration is made. (Earlier, transformers may be halfway through importing what the models need.)
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"
_CONFIGURATION = "fastcircuit.submodel.configuration_circuit"
_MODELING = "fastcircuit.submodel.modeling_circuit"


def register() -> None:
    """Arrange for the submodel classes to be added to the Auto classes; calling it again changes nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action()


def _register_config() -> None:
    config = importlib.import_module(_CONFIGURATION).CircuitConfig
    sys.modules[_AUTO].AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models_with_first_config() -> None:
    config = sys.modules[_CONFIGURATION].CircuitConfig
    make = config.__init__

    @functools.wraps(make)
    def register_and_make(self: Any, *args: Any, **kwargs: Any) -> None:
        config.__init__ = make
        _register_models()
        make(self, *args, **kwargs)

    config.__init__ = register_and_make


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    modeling = importlib.import_module(_MODELING)
    AutoModel.register(modeling.CircuitConfig, modeling.CircuitModel, exist_ok=True)
    AutoModelForCausalLM.register(modeling.CircuitConfig, modeling.CircuitForCausalLM, exist_ok=True)


_ACTIONS: dict[str, Callable[[], None]] = {
    _AUTO: _register_config,
    _CONFIGURATION: _register_models_with_first_config,
}


class _AfterImport:
    """An import hook that finds modules as ever and runs our action at the end of two of them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _ACTIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_then_act(module: ModuleType) -> None:
                execute(module)
                _ACTIONS[name]()

            loader.exec_module = execute_then_act
        return spec

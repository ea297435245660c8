"""Makes kernels/ importable as fastcircuit_kernels when the tests run in a checkout that is not installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

if importlib.util.find_spec("fastcircuit_kernels") is None:
    package = ModuleType("fastcircuit_kernels")
    package.__path__ = [str(Path(__file__).parents[2] / "kernels")]
    package.__spec__ = importlib.util.spec_from_loader("fastcircuit_kernels", loader=None, is_package=True)
    sys.modules["fastcircuit_kernels"] = package

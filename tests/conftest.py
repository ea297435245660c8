"""Workers of pytest-xdist share the cores: each takes its part of them, before torch counts them."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.interpreter import interpreter_fails

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items):
    """Slow tests first: a worker that begins one last keeps the others waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    reason = interpreter_fails()
    if reason is not None:
        for item in items:
            if "triton" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


# A checkout that is not installed has kernels/ under its own name only.
if importlib.util.find_spec("fastcircuit_kernels") is None:
    package = ModuleType("fastcircuit_kernels")
    package.__path__ = [str(Path(__file__).parents[1] / "kernels")]
    package.__spec__ = importlib.util.spec_from_loader("fastcircuit_kernels", loader=None, is_package=True)
    sys.modules["fastcircuit_kernels"] = package

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime.interpreter import InterpretedFunction

    patching, patched = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        """A device function's call: the first of its module patches the language, which takes longer than most calls.

        What it patches beside the kernel's own patches stays so.
        """
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return patching(self, *args, **kwargs)

    InterpretedFunction.__call__ = call

"""Imports point one way, and the heavy ones are lazy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastcircuit

ROOT = Path(fastcircuit.__file__).parent
# Lower layers first; a module may import its own layer (except where forbidden below) and lower ones.
LAYERS = [
    {"errors", "files", "interrupts", "_C"},
    {"ops", "zoo"},
    {"graph", "circuit", "masks", "formats"},
    {"models"},
    {"tasks", "evaluation"},
    {"discovery", "submodel"},
    {"extraction"},
    {"serving", "report", "system"},
    {"demo", "sweep", "benchmarks"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastcircuit":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fastcircuit."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for other in imports_of(path):
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}"
        assert {own, other} != {"discovery", "extraction"}


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fastcircuit; assert 'torch' not in sys.modules; fastcircuit.Circuit; fastcircuit.discover"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    for name in fastcircuit.__all__:
        assert getattr(fastcircuit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastcircuit.nothing

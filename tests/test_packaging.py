"""The package as users install it: archives, installs with and without a compiler, and no clash over `kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = ("build", "dist", "*.so", "*.egg-info", "__pycache__", "build_note.txt")
LEFT_OUT = shutil.ignore_patterns(".git", ".*_cache", *BUILT)

pytestmark = pytest.mark.slow


def _run(*command, cwd, **env):
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**outside, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _build(kind, source, out, **env):
    """One archive through the PEP 517 hooks, with the build requirements of this environment."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    return out / _run(sys.executable, "-c", code, cwd=source, **env).splitlines()[-1]


def _venv(folder):
    """A fresh environment that sees this one's packages (torch is too large to install again)."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(site) / "zz_host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _install(python, *what, **env):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation")
    _run(*pip, *what, cwd=python.parent, **env)


def _hasty_compiler(folder):
    """One that optimises nothing: for a build that is not measured."""
    compiler = folder / "hasty-c++"
    compiler.write_text(
        f'#!/bin/sh\nexec {shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout as a clone would have it: nothing built."""
    copy = tmp_path_factory.mktemp("source") / "fastcircuit"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy


@pytest.fixture(scope="module")
def archives(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    sdist = _build("sdist", source, out)
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(unpacked, filter="data")
    return sdist, _build("wheel", next(unpacked.iterdir()), out, CXX=_hasty_compiler(out))


@pytest.fixture(scope="module")
def python(archives, tmp_path_factory):
    python = _venv(tmp_path_factory.mktemp("wheel") / "venv")
    _install(python, archives[1])
    return python


CHECK = """
import torch, fastcircuit, fastcircuit_kernels
from fastcircuit.ops import available_backends, masked_read
assert masked_read(torch.ones(2, 3, 4), torch.ones(1, 2)).eq(2).all()
print(available_backends()["cpu"])
print(fastcircuit.__file__)
"""


def test_sdist_has_everything_a_build_needs(archives):
    with tarfile.open(archives[0]) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for folder in ("csrc", "kernels", "tests", "bench"):
        ours = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")}
        assert ours <= names, ours - names
    assert {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "fastcircuit/py.typed"} <= names
    assert {f"docs/{page.name}" for page in (ROOT / "docs").iterdir()} <= names  # the README leads there, tests run it
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_wheel_has_the_extension_the_kernels_and_the_data(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    assert any(name.startswith("fastcircuit/_C.") for name in names)
    assert {"fastcircuit_kernels/masked_read.py", "fastcircuit/py.typed", "fastcircuit/build_note.txt"} <= names
    assert "fastcircuit_kernels/__init__.py" not in names
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/"))]
    data = [p for folder in ("zoo", "tasks") for p in (ROOT / "fastcircuit" / folder).rglob("*")]
    wanted = {str(p.relative_to(ROOT)) for p in data if p.is_file() and "__pycache__" not in p.parts}
    assert wanted <= names, wanted - names


def test_wheel_works_outside_and_inside_the_repository(python, source, tmp_path):
    backend, where = _run(python, "-c", CHECK, cwd=tmp_path).split()
    assert backend == "None"
    assert str(python.parents[1]) in where
    _run(python, "-c", "import transformers, transformers.modeling_utils, fastcircuit_kernels", cwd=source)


@pytest.mark.parametrize("present", [True, False])
def test_a_package_called_kernels_does_no_harm(python, tmp_path, present):
    """Hugging Face's optional dependency has that name: present or absent, both must import."""
    if present:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    code = "import fastcircuit.ops, fastcircuit_kernels, transformers; transformers.GPT2LMHeadModel"
    _run(python, "-c", code, cwd=tmp_path)


def test_editable_install(source, tmp_path):
    python = _venv(tmp_path / "venv")
    _install(python, "-e", source, CXX=_hasty_compiler(tmp_path))
    backend, where = _run(python, "-c", CHECK, cwd=tmp_path).split()
    assert backend == "None"
    assert where == str(source / "fastcircuit" / "__init__.py")
    _run(python, "-c", "import transformers.modeling_utils, fastcircuit_kernels", cwd=source)


def test_without_a_compiler_it_installs_and_says_what_is_missing(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=LEFT_OUT)
    python = _venv(tmp_path / "venv")
    _install(python, copy, CC="/nowhere/cc", CXX="/nowhere/c++")
    report = _run(python, "-c", CHECK, cwd=tmp_path)
    assert "no C++ compiler" in report
    assert "/nowhere/c++" in report
    assert "Install a C++17 compiler and reinstall" in report

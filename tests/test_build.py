"""The build of the extension where it fails: the package installs without it, and a note says why."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
ERRORS = {
    "no headers": "bindings.cpp:3:10: fatal error: Python.h: No such file or directory",
    "an old compiler": "c++: error: unrecognized command-line option '-mavx512f'",
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(ninja's script)``: ``setup.py``'s build command with that ninja, into ``tmp_path``."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    ninja = pytest.importorskip("ninja")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("fastcircuit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)

    def build(script, inplace=False):
        (tmp_path / "ninja").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "ninja").chmod(0o755)
        monkeypatch.setattr(ninja, "BIN_DIR", str(tmp_path))
        command = module.NinjaBuild(setuptools.Distribution({"name": "fastcircuit"}))
        command.extensions = [setuptools.Extension("fastcircuit._C", sources=[], optional=True)]
        command.distribution.ext_modules = command.extensions
        command.build_lib, command.build_temp, command.inplace = str(tmp_path / "lib"), str(tmp_path / "temp"), inplace
        command.ensure_finalized()
        command.run()
        return command

    return build


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_failed_build_leaves_no_extension_and_a_note(build, tmp_path, error, capfd):
    command = build(f"echo 'FAILED: bindings.o'; echo \"{error}\" >&2; exit 1")
    assert [Path(path).name for path in command.get_outputs()] == ["build_note.txt"]
    note = (tmp_path / "lib" / "fastcircuit" / "build_note.txt").read_text()
    assert note.startswith(f"building it failed: {error} (it needs Python's headers")
    assert "FAILED: bindings.o" in capfd.readouterr().out


def test_a_failed_editable_build_removes_the_extension_of_an_earlier_one(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stale = tmp_path / "fastcircuit" / EXTENSION
    stale.parent.mkdir()
    stale.write_text("old")
    build("exit 1", inplace=True)
    assert not stale.exists()
    assert "building it failed" in (tmp_path / "fastcircuit" / "build_note.txt").read_text()


def test_a_build_that_works_has_the_extension_and_no_failure(build, tmp_path):
    command = build(f"touch {tmp_path}/lib/fastcircuit/{EXTENSION}")
    assert sorted(Path(path).name for path in command.get_outputs()) == [EXTENSION, "build_note.txt"]
    note = (tmp_path / "lib" / "fastcircuit" / "build_note.txt").read_text()
    assert note == "" or note.startswith("no OpenMP")

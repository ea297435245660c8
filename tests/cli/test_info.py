"""``fastcircuit info``."""

import torch

from fastcircuit.ops import backends, extension


def test_info(run, answer):
    found = answer("info")
    assert set(found) == {"versions", "devices", "backends", "instruction_sets", "architectures", "models", "tasks"}
    assert torch.__version__.startswith(found["versions"]["torch"])  # a wheel may add what it was built for
    assert found["backends"]["reference"] is None
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert all(name in out for name in (*found["models"], *found["tasks"]))


def test_info_says_what_the_build_found_missing(run, answer, tmp_path, monkeypatch):
    (tmp_path / "build_note.txt").write_text("building it failed: fatal error: Python.h\n")
    monkeypatch.setattr(extension, "kernels", None)
    monkeypatch.setattr(extension.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(backends, "missing_reason", backends.missing_reason.__wrapped__)  # which is cached
    why = "fastcircuit._C is missing: building it failed: fatal error: Python.h. Install a C++17 compiler"
    found = answer("info")
    assert all(why in found[key][name] for key, name in (("backends", "cpu"), ("instruction_sets", "avx2")))
    assert "building it failed: fatal error: Python.h" in " ".join(run("info")[1].replace("│", " ").split())

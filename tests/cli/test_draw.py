"""``fastcircuit draw``."""

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "start"), [("c.svg", b"<svg"), ("c.png", b"\x89PNG"), ("new/c.html", b"<!doctype html>")]
)
def test_draw(finished, answer, name, start):
    assert answer("draw", finished / "circuit.json", "-o", name) == {"edges": 40, "files": [name]}
    assert start in Path(name).read_bytes()[:200]


def test_an_unknown_kind_of_picture_is_refused(refuses):
    refuses("draw {run}/circuit.json -o c.jpg", "its suffix is not one of .svg, .png, .html")


def test_a_full_disk_leaves_no_picture(finished, run, full_disk):
    code, out, err = run("draw", finished / "circuit.json", "-o", full_disk / "c.html")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert list(full_disk.glob("*.html")) == []

"""All commands together: help, bad usage, interrupts, and the unexpected."""

import sys

import pytest

from fastcircuit import cli
from fastcircuit.errors import InputError


def test_without_arguments_there_is_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(command in out for command in ("info", "discover", "evaluate", "compare", "draw", "demo"))


BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "option": ("info --frobnicate", "No such option: --frobnicate"),
    "command": ("frobnicate", "No such command 'frobnicate'"),
    "long name": (f"discover {{shelf}}/gpt2 --task pronoun --out {'x' * 300}", "xxx: File name too long"),
    "choice": ("discover {shelf}/gpt2 --device tpu", "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
}


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_writes_nothing(refuses, command, message):
    refuses(command, message)


def test_ctrl_c_outside_a_step(refuses, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcircuit.models.loading.load_model", stop)
    refuses("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl", "interrupted; nothing was left half-written", code=1)


def test_the_unexpected_is_one_line_too(refuses, monkeypatch):
    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("fastcircuit.models.loading.load_model", fail)
    message = "unexpected RuntimeError: first line second line (--debug shows where)"
    refuses("discover {shelf}/gpt2 --data {shelf}/pairs.jsonl", message, code=1)


def test_debug_shows_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastcircuit", "discover", "./nothing", "--task", "pronoun", "--debug"])
    with pytest.raises(InputError, match="no such model directory"):
        cli.main()

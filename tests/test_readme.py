"""The README keeps its word: its code runs, its numbers are the program's, its files exist.

A code block under ``<!-- tested -->`` is run, in order, in one empty directory; under ``<!-- tested: FILE -->`` it is
first written to FILE. Numbers of steps (``--steps N``, ``steps=N``) become 5; nothing else is changed.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fastcircuit import demo
from fastcircuit.cli import main
from fastcircuit.cli.app import app
from fastcircuit.system import system_info

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
BLOCK = re.compile(r"(?:<!-- (tested)(?:: (\S+))? -->\n)?```(\w+)\n(.*?)```\n", re.DOTALL)
FEW = "5"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the README's commands are a shell's")


def few_steps(code):
    return re.sub(r"(--steps |steps=)\d+", rf"\g<1>{FEW}", code)


def blocks(language):
    """``(tested, file, code)`` of the README's blocks in one language."""
    return [(bool(tested), file, code) for tested, file, kind, code in BLOCK.findall(README) if kind == language]


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 1
    tested, _, code = found[0]
    assert tested
    assert len(code.splitlines()) == 11
    exec(compile(few_steps(code), "README.md", "exec"), {})
    assert "Circuit(100 of 1701 edges" in capsys.readouterr().out
    assert sorted(path.name for path in Path("found").iterdir()) == ["circuit.json", "circuit.svg", "masks.safetensors"]


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ((_, file, rows),) = blocks("json")
    Path(file).write_text(rows, encoding="utf-8")
    commands = [line for tested, _, code in blocks("sh") if tested for line in few_steps(code).splitlines()]
    assert len(commands) == 6
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        assert sys.argv[0] == "fastcircuit"
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, command
    assert Path("runs/union.html").stat().st_size
    assert Path("runs/submodel/model.safetensors").stat().st_size


def test_what_is_not_run_is_only_the_installation():
    lines = [line for tested, _, code in blocks("sh") if not tested for line in code.splitlines()]
    assert [line.split()[:2] for line in lines] == [["make", "demo"], ["make", "test"], ["pip", "install"]]
    assert all("-c constraints.txt" in line for line in lines if line.startswith("pip"))


def test_the_demos_numbers_are_the_programs():
    stated = re.search(r"keeps ([\d,]+) of 1,701 edges", WORDS)
    assert int(stated[1]) == demo.EDGES
    assert float(re.search(r"KL divergence of at most ([\d.]+\d) nats", WORDS)[1]) == demo.WORST_KL
    assert float(re.search(r"accuracy of at least ([\d.]+\d)", WORDS)[1]) == demo.LEAST_ACCURACY
    assert float(re.search(r"loses at most ([\d.]+\d) of accuracy", WORDS)[1]) == demo.MOST_ACCURACY_LOST
    assert all(f"`{name}`" in WORDS for name in (*demo.PICTURES, demo.SUBMODEL))


def test_what_it_lists_is_what_there_is():
    found = system_info()
    for kind in ("architectures", "models", "tasks"):
        assert all(f"`{name}`" in README for name in found[kind]), kind
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands += [group.name for group in app.registered_groups]
    assert re.findall(r"^\| `fastcircuit (\w+)", README, re.MULTILINE) == [
        "demo",
        *(c for c in commands if c != "demo"),
    ]


def test_the_files_exist():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) < 200

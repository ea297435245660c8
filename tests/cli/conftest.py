"""What every test of the command line starts from: models, data, a finished run, and an empty directory."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.calls import QUICK, call, pairs, save_tiny, write_pairs


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Models, data and one finished run, not to be changed: gpt2/, llama/, pairs.jsonl, run/."""
    root = tmp_path_factory.mktemp("shelf")
    for name in ("gpt2", "llama"):
        save_tiny(root / name, name)
    write_pairs(root / "pairs.jsonl", pairs())
    return root


@pytest.fixture(scope="session")
def finished(shelf):
    """A finished run of the tiny GPT-2."""
    call("discover", shelf / "gpt2", "--data", shelf / "pairs.jsonl", *QUICK, "--out", shelf / "run", "--json")
    return shelf / "run"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in an empty directory, and none asks the network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def run(capsys):
    """``run(*arguments)``: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = call(*arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(run):
    """``answer(*arguments)``: the one JSON object of a command that succeeds."""

    def answer(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return answer


@pytest.fixture
def refuses(shelf, finished, run):
    """``refuses(command, message)``: one line on stderr that holds the message, and nothing written.

    In the command ``{shelf}`` and ``{run}`` stand for those directories.
    """

    def refuses(command, message, code=2):
        before = sorted(Path().rglob("*"))
        found, out, err = run(*command.format(shelf=shelf, run=finished).split())
        assert (found, out) == (code, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        assert message in err
        assert sorted(Path().rglob("*")) == before

    return refuses


@pytest.fixture
def full_disk(tmp_path):
    """A directory on a file system of 4 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)

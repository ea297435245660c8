"""Commits are compared in checkouts of their own, in turns, and nothing of them is left."""

import subprocess

import pytest

from fastcircuit.benchmarks import compare
from fastcircuit.benchmarks.rows import append
from fastcircuit.errors import InputError, RunError
from tests.bench.toys import row

MAIN = """
import pathlib, shutil, sys
assert sys.argv[1:4] == ["bench", "ops", "--quick"]
assert pathlib.Path("built").exists()
results = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
results.mkdir(parents=True, exist_ok=True)
shutil.copy("rows.csv", results / "cpu-toy.csv")
with open({log!r}, "a") as log:
    log.write(pathlib.Path("name").read_text())
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose commits "slow" and "fast" measure 10 and 5 ms, "empty" has no suite and "broken" fails."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=root, check=True)

    def commit(name, p50_ms):
        path = root / "rows.csv"
        path.unlink(missing_ok=True)
        made = append(tmp_path / name, [row(p20_ms=p50_ms, p50_ms=p50_ms, p80_ms=p50_ms)])
        path.write_bytes(made[0].read_bytes())
        (root / "name").write_text(name[0])
        git("add", "-A")
        git("commit", "-q", "-m", name)
        git("tag", name)

    git("init", "-q")
    (root / "setup.py").write_text("open('built', 'w').close()\n")
    commit("empty", 1.0)
    (root / "fastcircuit" / "benchmarks").mkdir(parents=True)
    for path in ("__init__.py", "benchmarks/__init__.py"):
        (root / "fastcircuit" / path).touch()
    (root / "fastcircuit" / "__main__.py").write_text(MAIN.format(log=str(tmp_path / "log")))
    commit("slow", 10.0)
    commit("fast", 5.0)
    (root / "setup.py").write_text("raise SystemExit('no compiler')\n")
    commit("broken", 1.0)
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def worktrees(root):
    return subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True).stdout.count("\n")


def test_two_commits(repository, tmp_path):
    seen = []
    (change,) = compare.compare("slow", "fast", "ops", lambda *about: seen.append(about))
    assert (change.old_ms, change.new_ms, change.verdict) == (10.0, 5.0, "faster")
    assert (tmp_path / "log").read_text() == "sf" * compare.PASSES
    assert len(seen) == 2 * compare.PASSES
    assert worktrees(repository) == 1


def test_commits_that_cannot_be_measured(repository):
    with pytest.raises(InputError, match="commit empty has no benchmark suite"):
        compare.compare("empty", "fast", "ops")
    with pytest.raises(RunError, match=r"commit broken: .* failed: no compiler"):
        compare.compare("slow", "broken", "ops")
    assert worktrees(repository) == 1

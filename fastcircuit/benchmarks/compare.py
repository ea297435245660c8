"""Two runs compared: result files, or commits that are checked out, built and measured in turns."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastcircuit.benchmarks.environment import ROOT
from fastcircuit.benchmarks.rows import Row, latest, read
from fastcircuit.errors import InputError, RunError

PASSES = 3


@dataclass(frozen=True)
class Change:
    """One variant of one case, before and after.

    Args:
        speedup: old median time over new; above 1 is faster.
        low, high: what the noise of both leaves possible: old p20 over new p80, and old p80 over new p20.
        old_ratio, new_ratio: to the baseline of the same run, where there is one.
        memory: new peak over old.
    """

    case: str
    variant: str
    old_ms: float
    new_ms: float
    speedup: float
    low: float
    high: float
    old_ratio: float | None
    new_ratio: float | None
    memory: float | None

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "within noise"

    def to_dict(self) -> dict[str, Any]:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**rounded, "verdict": self.verdict}


def compare(old: str, new: str, suite: str, on_case: Callable[[str, int, int], None] | None = None) -> list[Change]:
    """The variants that both runs have.

    Args:
        old, new: results files or directories; or commits, which are measured here with ``suite``, quick.

    Raises:
        InputError: neither a file nor a commit, or nothing in common. RunError: a commit could not be measured.
    """
    are_files = [Path(name).exists() for name in (old, new)]
    if all(are_files):
        before, after = (read(Path(name)) for name in (old, new))
    elif any(are_files):
        named = new if are_files[0] else old
        raise InputError(f"{named} is no file, and the other one is; compare two files or two commits")
    else:
        before, after = measure_commits([old, new], suite, on_case)
    found = changes(before, after)
    if not found:
        raise InputError(f"{old} and {new} have no case in common on the same device with as many threads")
    return found


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """What changed from the latest rows of ``before`` to those of ``after``."""
    old, new = latest(before), latest(after)
    return [_change(old[key], new[key]) for key in old if key in new]


def _change(old: Row, new: Row) -> Change:
    has_memory = old.peak_bytes and new.peak_bytes
    return Change(
        case=old.case,
        variant=old.variant,
        old_ms=old.p50_ms,
        new_ms=new.p50_ms,
        speedup=old.p50_ms / new.p50_ms,
        low=old.p20_ms / new.p80_ms,
        high=old.p80_ms / new.p20_ms,
        old_ratio=old.ratio,
        new_ratio=new.ratio,
        memory=new.peak_bytes / old.peak_bytes if has_memory and old.peak_bytes and new.peak_bytes else None,
    )


def measure_commits(
    names: Sequence[str], suite: str, on_case: Callable[[str, int, int], None] | None = None
) -> list[list[Row]]:
    """Rows of each commit: checked out beside this one, built, and measured PASSES times in turns.

    The rows of a commit are those of its fastest pass, case by case: what else the machine did can only add time.
    """
    commits = [_resolve(name) for name in names]
    with ExitStack() as stack:
        checkouts = [stack.enter_context(_Checkout(commit, name)) for commit, name in zip(commits, names, strict=True)]
        rows: list[list[Row]] = [[] for _ in names]
        for number in range(PASSES * len(names)):
            which = number % len(names)
            if on_case is not None:
                on_case(f"{names[which]}, {suite}", number, PASSES * len(names))
            rows[which] += checkouts[which].measure(suite)
    return [list(_fastest(found).values()) for found in rows]


def _fastest(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.key not in best or row.p50_ms < best[row.key].p50_ms:
            best[row.key] = row
    return best


class _Checkout:
    """A commit in a directory of its own (``git worktree``), with its kernels built; gone at the end."""

    def __init__(self, commit: str, name: str) -> None:
        self.commit, self.name = commit, name

    def __enter__(self) -> "_Checkout":
        self.parent = tempfile.TemporaryDirectory(prefix="fastcircuit-compare-")
        self.path = Path(self.parent.name) / "checkout"
        try:
            self._run(["git", "worktree", "add", "--quiet", "--detach", str(self.path), self.commit], ROOT)
            if not (self.path / "fastcircuit" / "benchmarks").is_dir():
                raise InputError(f"commit {self.name} has no benchmark suite; compare later ones")
            self._run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], self.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["git", "worktree", "remove", "--force", str(self.path)], cwd=ROOT, capture_output=True)
        self.parent.cleanup()

    def measure(self, suite: str) -> list[Row]:
        results = Path(self.parent.name) / "results"
        for file in results.glob("*.csv"):
            file.unlink()
        command = [sys.executable, "-m", "fastcircuit", "bench", suite, "--quick", "--results", str(results)]
        self._run(command, self.path)
        return read(results)

    def _run(self, command: list[str], where: Path) -> None:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RunError(f"commit {self.name}: {' '.join(command[:4])} failed: {' '.join(reason)}")


def _resolve(name: str) -> str:
    asked = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name} is neither a results file nor a commit of the repository")
    return done.stdout.strip()

"""Progress of a run: a bar with rate and time left on a terminal, a line at every tenth elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastcircuit.discovery.edge_pruning import Report


class Watcher(ABC):
    """What a run calls while it goes on."""

    console: Console

    def on_report(self, report: Report) -> None:
        """After some steps of optimisation."""
        self._show("discover", report.step + 1, report.steps, _numbers(report))

    def on_round(self, stage: str, done: int, most: int, kl: float) -> None:
        """After a round of refinement."""
        self._show(stage, done, most, f"training KL {kl:.3f}")

    def on_progress(self, stage: str, done: int, most: int) -> None:
        """After a part of anything that counts up to ``most``."""
        self._show(stage, done, most, "")

    def on_run(self, name: str, done: int, most: int, left: float) -> None:
        """After a run of a sweep; ``left`` is in seconds."""
        self._show("sweep", done, most, f"{name}  about {left / 60:.0f} min left" if left >= 60 else name)

    def on_note(self, line: str) -> None:
        """When a run goes on otherwise than it was asked to."""
        self.console.print(line, markup=False, soft_wrap=True)

    def on_candidate(self, done: int, most: int) -> None:
        """After some candidates of an extraction were decided."""
        self._show("extract", done, most, "components decided")

    def on_row(self, done: int, most: int) -> None:
        """After a phase at a batch size was timed."""
        self._show("time", done, most, "calls timed")

    def on_case(self, case: str, done: int, most: int) -> None:
        """Before a benchmark case is measured, and after the last one."""
        self._show("bench", done, most, case)

    @abstractmethod
    def _show(self, name: str, done: int, total: int, numbers: str) -> None: ...


@contextmanager
def watch(console: Console) -> Iterator[Watcher]:
    """Show a run on ``console``."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = [
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    ]
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:5.1f}/s")


class _Bars(Watcher):
    def __init__(self, progress: Progress) -> None:
        self.progress, self.console = progress, progress.console
        self.bars: dict[str, TaskID] = {}

    def _show(self, name: str, done: int, total: int, numbers: str) -> None:
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=total, numbers="")
        self.progress.update(self.bars[name], completed=done, total=total, numbers=numbers)


class _Lines(Watcher):
    def __init__(self, console: Console) -> None:
        self.console = console
        self.tenths: dict[str, int] = {}

    def _show(self, name: str, done: int, total: int, numbers: str) -> None:
        tenth = 10 * done // total
        if tenth != self.tenths.get(name, 0):
            self.tenths[name] = tenth
            self.console.print(f"{name} {done}/{total}  {numbers}", markup=False, soft_wrap=True)


def _numbers(report: Report) -> str:
    return f"KL {report.kl:.3f}  sparsity {report.edge_sparsity:.1%}"

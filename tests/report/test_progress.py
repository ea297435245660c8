"""The bar that a terminal shows, and the lines that a file gets."""

import io

from rich.console import Console

from fastcircuit.discovery.edge_pruning import Report
from fastcircuit.report import progress


def test_the_bar_has_rate_and_time_left(monkeypatch):
    now = iter(range(10_000))
    console = Console(
        file=io.StringIO(), force_terminal=True, width=120, color_system=None, get_time=lambda: float(next(now))
    )
    with progress.watch(console) as watcher:
        for step in (9, 19, 29):
            watcher.on_report(Report(40, step, 0.25, 0.1, 0.5, 0.6))
        watcher.on_note("out of memory at step 30: going on")
        (task,) = watcher.progress.tasks
        rate, left = task.speed, task.time_remaining
    shown = console.file.getvalue()
    assert rate > 0
    assert left > 0
    assert "30/40" in shown
    assert f"{rate:5.1f}/s 0:00:{int(left):02}" in shown
    assert "KL 0.250  sparsity 50.0%" in shown
    assert "out of memory at step 30: going on\n" in shown.replace("\r", "")


def test_a_file_gets_a_line_at_every_tenth():
    console = Console(file=io.StringIO(), width=120)
    with progress.watch(console) as watcher:
        for done in range(1, 41):
            watcher.on_progress("compare", done, 40)
    assert console.file.getvalue().split() == [word for done in range(4, 41, 4) for word in ("compare", f"{done}/40")]

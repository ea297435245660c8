"""The runs of a sweep spread over processes, the longest first; every worker holds the model and one seed's task."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from fastcircuit.sweep.plan import Job, is_attribution
from fastcircuit.sweep.runner import OnRun, Sweep

OpenSweep = Callable[[], Sweep]

_open_sweep: list[Sweep] = []


def run_in_workers(sweep: Sweep, open_sweep: OpenSweep, workers: int, on_run: OnRun | None = None) -> None:
    """Run what has no file yet, ``workers`` runs at a time.

    Args:
        open_sweep: makes the same sweep in a worker; picklable.
        on_run: as in :meth:`Sweep.run`, in the order in which runs end.
    """
    done = len(sweep.finished)
    groups = _groups(sweep.begin())
    if not groups:
        return
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    with ProcessPoolExecutor(workers, context, _start_worker, (open_sweep, threads)) as pool:
        pending = {pool.submit(_run_group, group): group for group in groups}
        try:
            for finished in as_completed(pending):
                for line in finished.result():
                    if sweep.on_note is not None:
                        sweep.on_note(line)
                for job in pending[finished]:
                    done += 1
                    if on_run is not None:
                        on_run(job, done, len(sweep.jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Runs that belong to one worker (those of one set of scores), the most costly first."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.method, job.seed) if is_attribution(job.method) else job, []).append(job)
    return sorted(groups.values(), key=lambda group: -sum(job.cost for job in group))


def _start_worker(open_sweep: OpenSweep, threads: int) -> None:
    torch.set_num_threads(threads)
    _open_sweep[:] = [open_sweep()]


def _run_group(group: list[Job]) -> list[str]:
    """Run them; returns what was noted of them."""
    return [line for job in group for line in _open_sweep[0].run_job(job)]

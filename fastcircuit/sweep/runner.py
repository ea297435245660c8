"""Running a sweep: every finished run is a file, so that a sweep that was stopped goes on where it was.

Runs share the model, the pairs and an attribution's scores, but Edge Pruning runs are not stacked into one batch: a
step of one fills the cores already, and the masks of different runs share no reads.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.discovery import BaselineSettings, Scores, attribute, discover
from fastcircuit.errors import InputError
from fastcircuit.evaluation.faithfulness import score, task_reference
from fastcircuit.evaluation.reference import OnNote, Reference
from fastcircuit.files import read_json, write_json
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.sweep.extraction import extraction_rows
from fastcircuit.sweep.plan import EXTRACTION, Job, Plan, is_attribution
from fastcircuit.tasks.task import Task

OnRun = Callable[[Job, int, int], None]
TaskOfSeed = Callable[[int], Task]


class Sweep:
    """A plan in a directory: ``plan.json``, ``runs/*.json`` (circuits with their metrics), ``scores/*.safetensors``.

    Args:
        task_of: the task as a seed makes it.
        on_note: called with a line, which names the run, when memory runs out and the run goes on with less at a time;
            what is said of a run is also in its file, and in its row.

    Raises:
        InputError: the directory holds runs of another model or task, or with other settings.
    """

    def __init__(
        self,
        plan: Plan,
        directory: str | os.PathLike[str],
        model: MaskedCausalLM,
        task_of: TaskOfSeed,
        on_note: OnNote | None = None,
    ) -> None:
        self.plan, self.directory, self.model, self.task_of = plan, Path(directory), model, task_of
        self.on_note, self._notes = on_note, list[str]()
        self.jobs = list(plan.jobs(model.graph))
        self._task: tuple[int, Task, Reference] | None = None
        self._scores: tuple[str, int, Scores] | None = None
        check_plan(plan, self.directory)

    def run(self, on_run: OnRun | None = None) -> None:
        """Run what has no file yet.

        Args:
            on_run: called after every run with how many are done, and how many there are.
        """
        done = len(self.finished)
        for job in self.begin():
            self.run_job(job)
            done += 1
            if on_run is not None:
                on_run(job, done, len(self.jobs))

    def begin(self) -> list[Job]:
        """The runs that have no file yet; when there are any, the plan is written down."""
        missing = self.missing
        if missing:
            self._at(missing[0].seed)  # whatever is wrong with the task is said before anything is written
            write_json(self.directory / "plan.json", self.plan.fixed())
        return missing

    def run_job(self, job: Job) -> list[str]:
        """Run ``job``, unless another process that works in the same directory has; returns what was noted of it."""
        if not self.path(job).exists():
            self._run(job)
        notes, self._notes = [f"{job.name}: {line}" for line in self._notes], []
        if self.on_note is not None:
            for line in notes:
                self.on_note(line)
        return notes

    @property
    def finished(self) -> list[Job]:
        """The runs that have a file."""
        return [job for job in self.jobs if self.path(job).exists()]

    @property
    def missing(self) -> list[Job]:
        """The runs that have none yet."""
        return [job for job in self.jobs if not self.path(job).exists()]

    def path(self, job: Job) -> Path:
        """The file of a finished run."""
        return self.directory / "runs" / f"{job.name}.json"

    def scores_path(self, method: str, seed: int) -> Path:
        return self.directory / "scores" / f"{method}-seed{seed}.safetensors"

    def _run(self, job: Job) -> None:
        task, reference = self._at(job.seed)
        if job.method == EXTRACTION:
            write_json(self.path(job), {"rows": extraction_rows(self.model, task, job.seed)})
            return
        circuit, seconds = self._circuit(job, task)
        metrics = score(reference, Masks.from_circuit(circuit), task=task)
        noted = {"notes": self._notes} if self._notes else {}
        dataclasses.replace(
            circuit,
            model=self.model.about,
            task=task.name,
            metrics={self.plan.split: metrics},
            provenance={**dataclasses.asdict(job), "seconds": seconds, **noted},
        ).save(self.path(job))

    def _circuit(self, job: Job, task: Task) -> tuple[Circuit, float | None]:
        """The circuit of one run and the seconds it took; of an attribution those of its scores, for all sizes."""
        plan = self.plan
        if is_attribution(job.method):
            scores = self._attributed(job.method, job.seed, task)
            return scores.circuit(job.size), scores.seconds
        started = time.perf_counter()
        if job.method == "acdc":
            baseline = BaselineSettings(threshold=job.threshold, **plan.removal)
            circuit = discover(self.model, task, "acdc", settings=baseline, on_note=self._note).circuit
        else:
            settings = plan.settings_of(job, self.model.graph)
            circuit = discover(self.model, task, edges=job.size, settings=settings, on_note=self._note).circuit
        return circuit, time.perf_counter() - started

    def _attributed(self, method: str, seed: int, task: Task) -> Scores:
        """Scores of every edge, computed once for all sizes."""
        if self._scores is None or self._scores[:2] != (method, seed):
            path = self.scores_path(method, seed)
            if path.exists():
                scores = Scores.load(path, self.model.graph, **self.plan.removal)
            else:
                started = time.perf_counter()
                scores = attribute(self.model, task, method, seed=seed, on_note=self._note, **self.plan.removal)
                scores = dataclasses.replace(scores, seconds=time.perf_counter() - started)
                scores.save(path)
            self._scores = method, seed, scores
        return self._scores[2]

    def _note(self, line: str) -> None:
        self._notes.append(line)

    def _at(self, seed: int) -> tuple[Task, Reference]:
        """The task of a seed, and what its circuits are measured against; kept until another seed is asked for."""
        if self._task is None or self._task[0] != seed:
            task = self.task_of(seed)
            reference = task_reference(
                self.model, task=task, split=self.plan.split, on_note=self._note, **self.plan.removal
            )
            self._task = seed, task, reference
        return self._task[1:]


def check_plan(plan: Plan, directory: Path) -> None:
    """InputError when the directory's runs have another model, task or setting than ``plan``."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {directory} is a file; name a directory")
    if not (directory / "plan.json").exists():
        return
    before: Any = read_json(directory / "plan.json", "plan")
    for key, value in plan.fixed().items():
        if not isinstance(before, dict) or before.get(key) != value:
            other = before.get(key) if isinstance(before, dict) else None
            raise InputError(f"{directory} holds a sweep with {key} {other!r}, not {value!r}; choose another --out")

"""A discovery run in a directory: checkpoint while it runs, circuit and masks when it is done."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.baselines import BaselineSettings, OnProgress
from fastcircuit.discovery.discovery import METHODS, discover
from fastcircuit.discovery.edge_pruning import Report
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.presets import preset
from fastcircuit.discovery.refine import OnRound
from fastcircuit.discovery.settings import Settings
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.tasks.task import Task

OnReport = Callable[[Report], None]


def settings_for(method: str, preset_name: str | None, changes: dict[str, Any]) -> Settings | BaselineSettings:
    """The settings of a method, from a preset of Edge Pruning or its defaults, with ``changes``; unknown ones named."""
    if method not in METHODS:
        raise InputError(f"no method {method!r}; methods are {', '.join(METHODS)}")
    if method == "edge-pruning":
        return (preset(preset_name) if preset_name else Settings()).changed(changes)
    if preset_name:
        raise InputError(f"presets are of edge-pruning; method {method} has none")
    return BaselineSettings().changed(changes)


class Run:
    """One directory: ``checkpoint.safetensors`` while running, then ``circuit.json`` and ``masks.safetensors``.

    Args:
        directory: created when needed.
        resume: take up the checkpoint in it.
        overwrite: replace what is in it.
        tensorboard: log to ``directory/tensorboard``.

    Raises:
        InputError: there is a finished or interrupted run in the directory, and neither flag says what to do with it.
    """

    def __init__(
        self, directory: Path, resume: bool = False, overwrite: bool = False, tensorboard: bool = False
    ) -> None:
        self.directory = directory
        self.resume = resume
        self.tensorboard = tensorboard
        self.checkpoint = directory / "checkpoint.safetensors"
        self.files: list[Path] = []
        if directory.exists() and not directory.is_dir():
            raise InputError(f"--out {directory} is a file; name a directory")
        if resume and overwrite:
            raise InputError("--resume and --overwrite contradict each other; give one")
        if resume or overwrite:
            return
        for name, what in (("circuit.json", "a finished"), (self.checkpoint.name, "an interrupted")):
            if (directory / name).exists():
                mend = (
                    "--overwrite to replace it"
                    if what == "a finished"
                    else "--resume to go on or --overwrite to start anew"
                )
                raise InputError(f"{directory} holds {what} run; choose another --out, or {mend}")

    def discover(
        self,
        model: MaskedCausalLM,
        task: Task,
        method: str,
        settings: Settings | BaselineSettings,
        sparsity: float | None = None,
        edges: int | None = None,
        kl_budget: float | None = None,
        on_report: OnReport | None = None,
        on_round: OnRound | None = None,
        on_progress: OnProgress | None = None,
        on_note: Callable[[str], None] | None = None,
        execution: Execution | None = None,
    ) -> Circuit:
        """Find the circuit, write both files, evaluate it on the test split (or, without one, on train).

        Raises:
            RunError: as :func:`discover` and :func:`evaluate` do; says what was kept.
        """
        with _Logs(self.directory / "tensorboard" if self.tensorboard else None) as log:
            found = discover(
                model,
                task,
                method,
                sparsity=sparsity,
                edges=edges,
                kl_budget=kl_budget,
                settings=settings,
                checkpoint=self.checkpoint,
                resume=self.resume,
                on_report=_both(on_report, log),
                on_round=on_round,
                on_progress=on_progress,
                on_note=on_note,
                execution=execution,
            )
        split = "test" if "test" in task.splits else "train"
        self.files = found.save(self.directory)  # before anything else can fail
        self.checkpoint.unlink(missing_ok=True)
        path = self.files[0]
        try:
            metrics = {split: evaluate(model, found.circuit, task, split, on_note=on_note)}
        except RunError as error:
            raise RunError(f"{error}; the circuit is in {path}, without metrics") from error
        circuit = dataclasses.replace(found.circuit, metrics=metrics)
        circuit.save(path)
        return circuit


class _Logs:
    """TensorBoard scalars of every report; does nothing without a directory."""

    def __init__(self, directory: Path | None) -> None:
        self.writer: Any = None
        if directory is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs the tensorboard package: pip install tensorboard") from error
        self.writer = SummaryWriter(directory)

    def __enter__(self) -> OnReport | None:
        return self._log if self.writer else None

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def _log(self, report: Report) -> None:
        for name in ("kl", "penalty", "edge_sparsity", "edge_target"):
            self.writer.add_scalar(name, getattr(report, name), report.step)


def _both(first: OnReport | None, second: OnReport | None) -> OnReport:
    def on_report(report: Report) -> None:
        for callback in (first, second):
            if callback is not None:
                callback(report)

    return on_report

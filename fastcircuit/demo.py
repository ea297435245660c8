"""The demo: in a real small Llama, find the circuit that says "She" or "He" after a name, evaluate it, draw it, and
extract a smaller model that still does it.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcircuit.circuit import Circuit
from fastcircuit.discovery.edge_pruning import Report
from fastcircuit.discovery.refine import OnRound
from fastcircuit.discovery.run import Run
from fastcircuit.discovery.settings import Settings
from fastcircuit.errors import RunError
from fastcircuit.extraction.extract import Extraction, run_extraction, speed_of
from fastcircuit.extraction.path import OnCandidate
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.report import draw
from fastcircuit.submodel.speed import OnRow, SpeedRow
from fastcircuit.tasks import load_task

MODEL, TASK, EDGES = "stories260K", "pronoun", 170
# A short run, so that the whole story takes about a minute on two cores.
SETTINGS = Settings(refine=False)
# What the README states of the demo's circuit, on prompts with names it has not seen.
WORST_KL = 0.25
LEAST_ACCURACY = 0.75
PICTURES = ("circuit.html", "circuit.svg", "circuit.png")
SUBMODEL = "submodel"
MOST_ACCURACY_LOST = 0.01


@dataclass(frozen=True)
class Story:
    """What the demo found: the circuit with its test metrics, the seconds that took, the submodel, and the files."""

    circuit: Circuit
    seconds: float
    extraction: Extraction
    speed: list[SpeedRow]
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        metrics = self.circuit.metrics["test"]
        return {
            "discover": {
                "edges": self.circuit.num_edges,
                "total_edges": self.circuit.graph.num_edges,
                "sparsity": self.circuit.sparsity,
                "test": {name: metrics[name] for name in ("kl", "accuracy", "logit_difference", "exact_match")},
                "seconds": self.seconds,
            },
            "extract": {**self.extraction.to_dict(), "speed": [row.to_dict() for row in self.speed]},
            "files": [str(path) for path in self.files],
        }

    def check(self) -> None:
        """RunError when the circuit or the submodel is worse than the README states."""
        metrics = self.circuit.metrics["test"]
        if not (metrics["kl"] <= WORST_KL and metrics["accuracy"] >= LEAST_ACCURACY):
            raise RunError(
                f"the demo's circuit has test KL {metrics['kl']:.3f} and accuracy {metrics['accuracy']:.3f}; "
                f"stated are at most {WORST_KL} and at least {LEAST_ACCURACY}"
            )
        change = self.extraction.metrics["accuracy_change"].mean
        if change < -MOST_ACCURACY_LOST:
            raise RunError(
                f"the demo's submodel loses {-change:.3f} of accuracy; stated is at most {MOST_ACCURACY_LOST}"
            )


def run_demo(
    out: Path,
    seed: int = 0,
    on_report: Callable[[Report], None] | None = None,
    on_round: OnRound | None = None,
    on_candidate: OnCandidate | None = None,
    on_row: OnRow | None = None,
) -> Story:
    """Discover, evaluate, draw and extract; everything is written into ``out``, replacing an earlier demo."""
    tokenizer = load_tokenizer(MODEL)
    model, task = load_model(MODEL), load_task(TASK, tokenizer)
    started = time.perf_counter()
    run = Run(out, overwrite=True)
    circuit = run.discover(
        model,
        task,
        "edge-pruning",
        SETTINGS.changed({"seed": seed}),
        edges=EDGES,
        on_report=on_report,
        on_round=on_round,
    )
    seconds = time.perf_counter() - started
    pictures = [out / name for name in PICTURES]
    for picture in pictures:
        draw(circuit, picture)
    extraction = run_extraction(model, task, seed=seed, on_candidate=on_candidate)
    speed = speed_of(model, extraction, task, on_row)
    shutil.rmtree(out / SUBMODEL, ignore_errors=True)
    extraction.save(out / SUBMODEL, tokenizer, speed)
    return Story(circuit, seconds, extraction, speed, [*run.files, *pictures, out / SUBMODEL])

"""The demo: in a real small Llama, find the circuit that says "She" or "He" after a name, evaluate it, draw it."""

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
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.report import draw
from fastcircuit.tasks import load_task

MODEL, TASK, EDGES = "stories260K", "pronoun", 170
# A short run, so that the whole story takes about a minute on two cores.
SETTINGS = Settings(refine=False)
# What the README states of the demo's circuit, on prompts with names it has not seen.
WORST_KL = 0.25
LEAST_ACCURACY = 0.75
PICTURES = ("circuit.html", "circuit.svg", "circuit.png")


@dataclass(frozen=True)
class Story:
    """What the demo found: the circuit with its test metrics, the files written, and the seconds it took to find."""

    circuit: Circuit
    files: list[Path]
    seconds: float

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
            "files": [str(path) for path in self.files],
        }

    def check(self) -> None:
        """RunError when the circuit is worse than the README states."""
        metrics = self.circuit.metrics["test"]
        if not (metrics["kl"] <= WORST_KL and metrics["accuracy"] >= LEAST_ACCURACY):
            raise RunError(
                f"the demo's circuit has test KL {metrics['kl']:.3f} and accuracy {metrics['accuracy']:.3f}; "
                f"stated are at most {WORST_KL} and at least {LEAST_ACCURACY}"
            )


def run_demo(
    out: Path,
    seed: int = 0,
    on_report: Callable[[Report], None] | None = None,
    on_round: OnRound | None = None,
) -> Story:
    """Discover, evaluate and draw; everything is written into ``out``, replacing an earlier demo."""
    model, task = load_model(MODEL), load_task(TASK, load_tokenizer(MODEL))
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
    return Story(circuit, [*run.files, *pictures], seconds)

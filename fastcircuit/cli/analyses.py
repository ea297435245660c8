"""What ``fastcircuit evaluate`` measures beyond the metrics, each only when asked for."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcircuit.errors import InputError


@dataclass(frozen=True)
class Analyses:
    """What was asked for.

    Args:
        completeness: random subsets of the circuit; None: not asked for.
        edges: file for the KL without every edge, ``.csv``; a plot of the same name beside it.
        most_examples: so many for that; None: all.
        scores: scores of all edges, to measure circuits of every size by.
        signed: rank edges by their score, negative ones last, instead of by its size.
        truth: a known circuit, by name or file.
        resamples, confidence, seed: of bootstrap intervals, and of the subsets.
    """

    completeness: int | None = None
    edges: Path | None = None
    most_examples: int | None = None
    scores: Path | None = None
    signed: bool = False
    truth: str | None = None
    resamples: int = 0
    confidence: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """InputError for what no model could make right."""
        if self.edges is not None and self.edges.suffix != ".csv":
            raise InputError(f"--edge-faithfulness {self.edges} must end in .csv; the plot gets the same name")
        if self.most_examples is not None and self.edges is None:
            raise InputError("--most-examples says how many --edge-faithfulness measures on; give both")
        if self.scores is not None and not self.scores.is_file():
            raise InputError(f"scores file {self.scores} does not exist")
        if self.signed and self.scores is None:
            raise InputError("--signed says how edges are ranked by --scores; give both")

    def run(self, model: Any, circuit: Any, task: Any, split: str, watcher: Any) -> dict[str, Any]:
        """JSON of each, by name."""
        from fastcircuit.discovery import Scores
        from fastcircuit.evaluation.completeness import completeness
        from fastcircuit.evaluation.truth import Truth, compare_with_truth, truth_roc

        found: dict[str, Any] = {}
        scores = None
        if self.scores is not None:
            scores = Scores.load(self.scores, circuit.graph, circuit.ablation, circuit.output_bias)
        truth = None if self.truth is None else Truth.load(self.truth, circuit.graph)
        if truth is not None:
            found["truth"] = compare_with_truth(circuit, truth)
        if truth is not None and scores is not None:
            curves = truth_roc(scores.ranking(not self.signed), scores.node_ranking(not self.signed), truth)
            found["roc"] = {kind: curve and curve.to_dict() for kind, curve in curves.items()}
        if scores is not None:
            found["faithfulness"] = self._faithfulness(model, scores, task, split, watcher)
        if self.completeness is not None:

            def on_subset(done: int, most: int) -> None:
                watcher.on_progress("complete", done, most)

            found["completeness"] = completeness(
                model,
                circuit,
                task,
                split,
                subsets=self.completeness,
                seed=self.seed,
                on_subset=on_subset,
                on_note=watcher.on_note,
            )
        if self.edges is not None:
            found["edge_faithfulness"] = self._edges(model, circuit, task, split, watcher)
        return found

    def _faithfulness(self, model: Any, scores: Any, task: Any, split: str, watcher: Any) -> dict[str, Any]:
        from fastcircuit.evaluation.curve import MIB_FRACTIONS, faithfulness_curve, grid

        sizes = grid(model.graph.num_edges)
        circuits = (scores.top(size, absolute=not self.signed).pruned() for size in sizes)
        return faithfulness_curve(
            model,
            circuits,
            task,
            split,
            resamples=self.resamples,
            confidence=self.confidence,
            seed=self.seed,
            on_circuit=lambda done: watcher.on_progress("curve", done, len(sizes) - 1),
            on_note=watcher.on_note,
            fractions=MIB_FRACTIONS,
        ).to_dict()

    def _edges(self, model: Any, circuit: Any, task: Any, split: str, watcher: Any) -> dict[str, Any]:
        from fastcircuit.discovery.edge_faithfulness import edge_faithfulness
        from fastcircuit.files import write_text
        from fastcircuit.report.plots import Panel, save_plot

        assert self.edges is not None
        measured = edge_faithfulness(
            model,
            circuit,
            task,
            split,
            self.most_examples,
            on_batch=lambda done, most: watcher.on_progress("edges", done, most),
            on_note=watcher.on_note,
        )
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("writer", "reader", "model_kl", "circuit_kl"))
        for (writer, reader), of_model, of_circuit in zip(
            measured.edges, measured.model, measured.circuit, strict=True
        ):
            table.writerow((writer, reader, f"{of_model:.6g}", f"{of_circuit:.6g}"))
        write_text(self.edges, text.getvalue())
        panel = Panel(
            "KL(model || model without the edge), nats",
            "KL(model || circuit without it), nats",
            points=(measured.model, measured.circuit),
            level=("circuit", measured.whole),
        )
        correlation = "not defined" if measured.correlation is None else f"{measured.correlation:.2f}"
        title = f"{circuit.task or task.name}: {circuit.num_edges} edges, correlation {correlation}"
        plots = save_plot([panel], self.edges.with_suffix(""), title)
        return {**measured.to_dict(), "files": [str(path) for path in (self.edges, *plots)]}

"""Edge Pruning on the 212 pronoun pairs, at the published code's sizes: ``python -m bench.pronoun [EDGES ...]``.

Every pair is learned from in both directions: what its corrupted prompt asks for is the same behaviour. Prints, per
number of edges, test KL and accuracy (mean and deviation over seeds) beside the published code's on the same pairs, and
the seconds of a run; appends the runs to bench/results/pronoun_212.csv.
"""

import statistics
import sys
import time

from bench.results import record
from fastcircuit.discovery import discover
from fastcircuit.evaluation.faithfulness import evaluate
from fastcircuit.models.loading import load_model, load_tokenizer
from fastcircuit.tasks import load_task

# Edges -> test KL, accuracy of the published code (1500 steps, batch 32, 750-815 s each on one core).
PUBLISHED = {128: (0.087, 0.887), 84: (0.178, 0.710), 51: (0.318, 0.661), 29: (0.549, 0.484)}
SEEDS = (0, 1, 2)


def main() -> None:
    model, task = load_model("stories260K"), load_task("pronoun-212", load_tokenizer("stories260K"))
    for edges in [int(size) for size in sys.argv[1:]] or list(PUBLISHED):
        published_kl, published_accuracy = PUBLISHED[edges]
        runs = [_run(model, task, edges, seed) for seed in SEEDS]
        record("pronoun_212", runs)
        kl, accuracy, seconds = ([run[name] for run in runs] for name in ("kl", "accuracy", "seconds"))
        print(
            f"{edges:4} edges: KL {statistics.mean(kl):.3f} +- {statistics.stdev(kl):.3f} (published {published_kl}), "
            f"accuracy {statistics.mean(accuracy):.3f} (published {published_accuracy}), "
            f"{statistics.median(seconds):.0f} s",
            flush=True,
        )


def _run(model, task, edges: int, seed: int) -> dict[str, float]:
    start = time.perf_counter()
    circuit = discover(model, task, edges=edges, seed=seed, both_directions=True).circuit
    seconds = time.perf_counter() - start
    assert circuit.num_edges == edges
    found = evaluate(model, circuit, task)
    numbers = {name: round(found[name], 5) for name in ("kl", "accuracy", "exact_match")}
    return {"edges": edges, "seed": seed, **numbers, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    main()

"""What a sweep runs: methods, sizes, seeds; and the runs that follow."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastcircuit.circuit import Ablation
from fastcircuit.discovery import attribution
from fastcircuit.discovery.acdc import check_threshold
from fastcircuit.discovery.discovery import METHODS as CIRCUIT_METHODS
from fastcircuit.discovery.presets import edge_target
from fastcircuit.discovery.rounding import edges_for_sparsity
from fastcircuit.discovery.settings import Settings
from fastcircuit.errors import InputError, check_seed
from fastcircuit.graph import Graph

EXTRACTION = "extract"
METHODS = (*CIRCUIT_METHODS, EXTRACTION)
SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.98)
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        size: edges to keep; None for methods that choose their own size.
        threshold: of ACDC; None for others.
    """

    method: str
    seed: int
    size: int | None = None
    threshold: float | None = None

    @property
    def name(self) -> str:
        """What its file is called, without the suffix."""
        if self.size is not None:
            return f"{self.method}-seed{self.seed}-edges{self.size}"
        return f"{self.method}-seed{self.seed}" + ("" if self.threshold is None else f"-threshold{self.threshold:g}")

    @property
    def cost(self) -> float:
        """About how long it takes beside the others: for their order, and for the time that is left."""
        if self.method == "edge-pruning":
            return 20 + 0.3 * (self.size or 0)
        return {"acdc": 10, EXTRACTION: 20, "exact": 5}.get(self.method, 1)


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Args:
        model, task: by name, for the record.
        methods: out of ``METHODS``: how to find circuits, and ``extract`` (circuit extraction: heads and MLPs).
        sparsities: fractions of edges to remove, for the methods that take a size.
        thresholds: of ACDC, nats.
        seeds: each decides its task's pairs and splits, and everything random in the method.
        settings: Edge Pruning's; their ablation, what a removed edge carries, is that of every method.
        preset: the experiment that ``settings`` are of; where the paper varied the edge target, every size gets its own
            (see :func:`fastcircuit.discovery.presets.edge_target`).
        split: what is measured on.
        train_size, test_size: pairs of these splits; None: the task's own numbers.
        dtype, embedding_nodes: the model was loaded with, for the record.

    Raises:
        InputError: nothing to run, an unknown method, a sparsity or threshold out of range.
    """

    model: str
    task: str
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = SPARSITIES
    thresholds: tuple[float, ...] = THRESHOLDS
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Settings = dataclasses.field(default_factory=Settings)
    preset: str | None = None
    split: str = "test"
    train_size: int | None = None
    test_size: int | None = None
    dtype: str = "float32"
    embedding_nodes: str = "split"

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "sparsities", "thresholds"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"a sweep needs {name}; give at least one")
            if len(set(values)) < len(values):
                raise InputError(f"{name} names one twice: {', '.join(map(str, values))}")
        for seed in self.seeds:
            check_seed(seed)
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"no method {method!r}; methods of a sweep are {', '.join(METHODS)}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise InputError(f"sparsity is {sparsity}; it must be in [0, 1), the fraction of edges that is removed")
        for threshold in self.thresholds:
            check_threshold(threshold)

    def jobs(self, graph: Graph) -> Iterator[Job]:
        """Its runs, method by method, seed by seed."""
        sizes = dict.fromkeys(edges_for_sparsity(graph, sparsity) for sparsity in self.sparsities)
        for method in self.methods:
            for seed in self.seeds:
                if method == "acdc":
                    yield from (Job(method, seed, threshold=threshold) for threshold in self.thresholds)
                elif method == EXTRACTION:
                    yield Job(method, seed)
                else:
                    yield from (Job(method, seed, size) for size in sizes)

    def settings_of(self, job: Job, graph: Graph) -> Settings:
        """Edge Pruning's in one run."""
        changes: dict[str, Any] = {"seed": job.seed}
        if self.preset is not None and job.size is not None:
            target = edge_target(self.preset, 1 - job.size / graph.num_edges)
            changes |= {} if target is None else {"edge_target": target}
        return self.settings.changed(changes)

    @property
    def ablation(self) -> Ablation:
        """What a removed edge carries."""
        return self.settings.ablation

    @property
    def sizes(self) -> dict[str, int]:
        """For :func:`fastcircuit.tasks.load_task`."""
        given = {"train": self.train_size, "test": self.test_size}
        return {split: size for split, size in given.items() if size is not None}

    @property
    def removal(self) -> dict[str, Any]:
        """What a removed edge carries, whatever the method."""
        return {"ablation": self.ablation, "output_bias": self.settings.output_bias}

    def fixed(self) -> dict[str, Any]:
        """What all runs in one directory share, as JSON would have it: all but methods, sizes and seeds."""
        settings = {key: value for key, value in self.settings.to_dict().items() if key != "seed"}
        named = ("model", "task", "preset", "split", "train_size", "test_size", "dtype", "embedding_nodes")
        return {**{name: getattr(self, name) for name in named}, **settings}


def is_attribution(method: str) -> bool:
    """Whether one set of scores gives the method's circuits of every size."""
    return method in attribution.METHODS

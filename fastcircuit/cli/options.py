"""What several commands take: their arguments and options."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class EmbeddingNodes(Enum):
    split = "split"
    joint = "joint"
    none = "none"


Model = Annotated[
    str, typer.Argument(help="Hugging Face id, local directory, or a shipped model (see `fastcircuit info`).")
]
TaskName = Annotated[str | None, typer.Option("--task", help="Task by name (see `fastcircuit info`).")]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", help='JSONL of pairs, {"clean": "a <predict>b</predict>", "corrupted": "c"}, or .csv.'),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
OnDevice = Annotated[Device, typer.Option(help="Where to run; auto takes a GPU when there is one.")]
InDtype = Annotated[Dtype, typer.Option(help="Precision of the model.")]
Nodes = Annotated[
    EmbeddingNodes,
    typer.Option(help="Embeddings as writers: token and position (split), one (joint), or always kept (none)."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

"""``fastcircuit extract``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastcircuit.cli.console import print_json, stderr, stdout
from fastcircuit.cli.options import (
    AsJson,
    DataFile,
    Device,
    Dtype,
    EmbeddingNodes,
    InDtype,
    Model,
    OnDevice,
    Seed,
    TaskName,
)
from fastcircuit.cli.sources import check_source, load_model, load_task


def extract(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the submodel to; must not exist.")],
    task: TaskName = None,
    data: DataFile = None,
    ablation: Annotated[
        str, typer.Option(help="What a removed component writes: mean, mean-positional or zero.")
    ] = "mean",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Remove a component if the KL rises by less than this many nats. Default 0.01, or what --size-budget "
            "needs.",
            show_default=False,
        ),
    ] = None,
    kl_budget: Annotated[float | None, typer.Option(help="Largest total KL, in nats.")] = None,
    size_budget: Annotated[
        float | None, typer.Option(help="Keep at most this fraction of the parameters (without embeddings).")
    ] = None,
    no_mlps: Annotated[bool, typer.Option("--no-mlps", help="Remove heads only.")] = False,
    circuit: Annotated[
        Path | None, typer.Option(help="Keep what this circuit.json keeps, instead of searching.")
    ] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Logits of the task's answer tokens only; cannot generate text.")
    ] = False,
    distill: Annotated[
        int | None,
        typer.Option(help="Also train a student of at most this size for so many epochs, to compare with.", min=1),
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    dtype: InDtype = Dtype.float32,
    as_json: AsJson = False,
) -> None:
    """Turn MODEL into a smaller model that is enough for a task; writes a Hugging Face model directory."""
    from fastcircuit.circuit import Circuit
    from fastcircuit.extraction.distillation import distill as train_student
    from fastcircuit.extraction.extract import check_options, run_extraction, speed_of
    from fastcircuit.files import check_new
    from fastcircuit.models.loading import load_tokenizer
    from fastcircuit.report.progress import watch
    from fastcircuit.report.tables import extraction_table, speed_table

    check_source(task, data)
    check_new(out)
    chosen = Circuit.load(circuit) if circuit else None
    options: dict[str, Any] = {
        "ablation": ablation,
        "threshold": threshold,
        "kl_budget": kl_budget,
        "size_budget": size_budget,
        "include_mlps": not no_mlps,
        "circuit": chosen,
    }
    check_options(**options)
    masked = load_model(model, device, dtype, EmbeddingNodes(chosen.graph.embedding_nodes if chosen else "split"))
    pairs = load_task(model, masked, task, data, seed)
    with watch(stderr) as watcher:
        extraction = run_extraction(
            masked, pairs, answers_only=answers_only, seed=seed, on_candidate=watcher.on_candidate, **options
        )
        rows = speed_of(masked, extraction, pairs, watcher.on_row)
        student = None
        if distill is not None:
            student = train_student(
                masked,
                pairs,
                extraction.size.blocks,
                distill,
                seed=seed,
                on_epoch=lambda done, most: watcher.on_progress("distill", done, most),
            ).to_dict()
    extraction.save(out, load_tokenizer(model), rows)
    found, speed = extraction.to_dict(), [row.to_dict() for row in rows]
    if as_json:
        baseline = {} if student is None else {"distillation": student}
        print_json({"extract": {**found, "speed": speed, **baseline}, "directory": str(out)})
    else:
        stdout.print(extraction_table(found, pairs.name), speed_table(speed))
        if student is not None:
            stdout.print(
                f"a student of {student['layers']} layers, distilled: accuracy {student['accuracy']:.4f}, "
                f"KL {student['kl']:.4f} nats (the best of {distill} epochs on validation prompts)"
            )
        stdout.print(f"wrote {out}", soft_wrap=True)

"""``fastcircuit serve``."""

from pathlib import Path
from typing import Annotated

import typer

from fastcircuit.cli.options import Device, Dtype, OnDevice


def serve(
    directories: Annotated[list[Path], typer.Argument(help="Submodels that `fastcircuit extract` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    max_batch_size: Annotated[int, typer.Option(help="Sequences of a model generated together at most.")] = 32,
    device: OnDevice = Device.auto,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision. Default: as saved.", show_default=False)] = None,
) -> None:
    """Serve submodels over OpenAI's completions API: /v1/models, /v1/completions, /health."""
    from fastcircuit.models.loading import choose_device
    from fastcircuit.serving.server import serve as run

    where = choose_device(device.value)
    run(directories, host, port, device=where, dtype=dtype and dtype.value, max_batch_size=max_batch_size)

"""fastcircuit serve: directories in, a running server out."""

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fastcircuit.errors import InputError, RunError
from fastcircuit.models.loading import load_tokenizer, quiet
from fastcircuit.submodel.saving import load_submodel

_SECONDS_TO_FINISH = 5  # for answers under way when the server is told to stop


def serve(
    directories: Sequence[str | os.PathLike[str]],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    max_batch_size: int = 32,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve extracted circuits over OpenAI's completions API until SIGINT (Ctrl-C) or SIGTERM.

    What is under way then is answered.

    Args:
        directories: made by ``save_submodel``, with their tokenizers; each is a model named like its directory.
        port: 0 takes any free one.
        device, dtype: as in :func:`load_submodel`, for all of them.
        max_batch_size: how many sequences of one model are generated together at most.
        announce: called with one line when requests are welcome; by default it goes to stderr.

    Raises:
        InputError: a missing optional dependency, a directory that holds no circuit, two with the same name, or a port
            that is none. RunError: the address cannot be listened on.
    """
    _check_installed()
    import uvicorn

    from fastcircuit.serving.app import create_app
    from fastcircuit.serving.engine import Engine

    if max_batch_size < 1:
        raise InputError(f"max_batch_size is {max_batch_size}; it must be at least 1")
    loaded = {
        name: (load_submodel(directory, device, dtype), _tokenizer(directory))
        for name, directory in _names(directories).items()
    }
    with _listen(host, port) as listening, quiet():
        engines = {name: Engine(*parts, max_batch_size=max_batch_size) for name, parts in loaded.items()}
        server = uvicorn.Server(
            uvicorn.Config(create_app(engines), log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_FINISH)
        )
        (announce or _print)(f"serving {', '.join(engines)} at {_url(listening)} (Ctrl-C stops)")
        with suppress(KeyboardInterrupt):  # uvicorn has shut down by then, and raises it or not
            server.run(sockets=[listening])


def _check_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"`fastcircuit serve` needs {' and '.join(missing)}: pip install 'fastcircuit[serve]'")


def _names(directories: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """The directories by the names of their models."""
    if not directories:
        raise InputError("no directory to serve; name one that `fastcircuit extract` wrote")
    names: dict[str, str] = {}
    for given in directories:
        directory = os.fspath(given)
        name = Path(directory).expanduser().resolve().name
        if name in names:
            raise InputError(
                f"{names[name]} and {directory} would both be served as {name!r}, the name of the directory; rename one"
            )
        names[name] = directory
    return names


def _tokenizer(directory: str) -> object:
    tokenizer = load_tokenizer(directory)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {directory!r} is no fast one (tokenizer.json); save a fast one along")
    return tokenizer


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InputError(f"port is {port}; accepted: 0 (any free one) to 65535")
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        code = None if isinstance(error, socket.gaierror) else error.errno
        reason = os.strerror(code) if code else error.strerror or str(error)
        raise RunError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Whole-file writes and readable errors for the files a user names."""

import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastcircuit.errors import InputError, RunError


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` beside ``path``, flush it to disk and rename it to ``path``: all of it or nothing.

    Raises:
        RunError: the file cannot be written (no space, no permission); nothing is left behind.
    """
    target = Path(path)
    with _writing(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            _flush(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_directory(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` on a new directory beside ``path`` and rename it to ``path``: all of it or nothing.

    Raises:
        InputError: there is something at ``path`` already.
        RunError: the directory cannot be written (no space, no permission); nothing is left behind.
    """
    target = Path(path)
    check_new(target)
    with _writing(target):
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Make the directory ``target`` is to lie in; what fails in the block is a RunError that names ``target``."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write {target}: {reason}; free some space or choose another --out") from error


def _flush(file: Path) -> None:
    """Give a new file its mode, and to the disk what is in it."""
    file.chmod(0o666 & ~_umask())
    with file.open("rb") as written:
        os.fsync(written.fileno())


def check_new(directory: str | os.PathLike[str]) -> None:
    """InputError unless ``directory`` can be made: nothing is there yet, and its parent can be written into."""
    target = Path(directory)
    if os.path.lexists(target):
        raise InputError(f"{target} exists already; choose another --out, or remove it")
    check_writable(target)


def check_writable(directory: str | os.PathLike[str]) -> None:
    """InputError unless files can be written into ``directory`` (which need not exist, and is not left behind).

    For the start of a long run, so that it does not fail at its end.
    """
    target = Path(directory)
    made = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {target}: {error.strerror or error}; choose another --out") from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically (see :func:`write_atomically`)."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, compact: bool = False) -> None:
    """Write a JSON file atomically, two spaces of indent and a final newline, or on one line; ``.gz`` is compressed."""
    if compact:
        text = json.dumps(value, allow_nan=False)
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if Path(path).suffix == ".gz":
        packed = gzip.compress(text.encode("utf-8"), mtime=0)
        write_atomically(path, lambda temporary: _write_bytes(temporary, packed))
    else:
        write_text(path, text)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Read a JSON file, plain or gzipped; ``what`` names it in errors ("circuit", "edge list").

    Raises:
        InputError: no such file, not text, or not JSON.
    """
    try:
        raw = Path(path).read_bytes()
        return json.loads((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} file {path} does not exist; name one that does") from None
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{what} file {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} file {path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); mend it "
            "there, or, if it was cut short, write it again"
        ) from None
    except RecursionError:
        raise InputError(f"{what} file {path} is nested too deep to be one") from None

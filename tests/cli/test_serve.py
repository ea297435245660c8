"""``fastcircuit serve``: what keeps it from starting. What it serves is tested in ``tests/serving``."""

import socket

import pytest

from tests.cli.calls import call

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

BAD_CALLS = {
    # what: the command, exit code 2; what the line says
    "no directory": ("serve", "Missing argument"),
    "wrong directory": ("serve nothing", "no such directory: nothing; name one that `fastcircuit extract` wrote"),
    "empty directory": ("serve .", "there is no config.json in it"),
    "another model": ("serve {shelf}/gpt2", "holds a model of type 'gpt2', not a submodel"),
    "port": ("serve {shelf}/submodel --port 70000", "port is 70000; accepted: 0 (any free one) to 65535"),
    "no number": ("serve {shelf}/submodel --port http", "Invalid value for '--port'"),
    "batch": ("serve {shelf}/submodel --max-batch-size 0", "max_batch_size is 0"),
    "dtype": ("serve {shelf}/submodel --dtype int8", "'int8' is not one of 'float32', 'bfloat16', 'float64'"),
    "twice": ("serve {shelf}/submodel {shelf}/submodel/", "would both be served as 'submodel'"),
}


@pytest.fixture(scope="session", autouse=True)
def submodel(shelf):
    """``{shelf}/submodel``: an extraction from the tiny GPT-2."""
    arguments = ["--data", shelf / "pairs.jsonl", "--threshold", "1e-7", "--out", shelf / "submodel"]
    assert call("extract", shelf / "gpt2", *arguments) == 0


@pytest.mark.parametrize(("command", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line(refuses, command, message):
    refuses(command, message)


def test_a_port_that_is_taken(refuses):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
        refuses(f"serve {{shelf}}/submodel --port {port}", message, code=1)

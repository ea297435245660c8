"""What is wrong before the server starts is said in one line."""

import importlib.util
import shutil
import socket

import pytest

from fastcircuit import zoo
from fastcircuit.errors import InputError, RunError
from fastcircuit.serving.server import serve

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def refuse(error, message, directories, **options):
    def never(line):
        raise AssertionError(f"the server started: {line}")

    with pytest.raises(error, match=message) as caught:
        serve(directories, announce=never, **{"port": 0, **options})
    assert "\n" not in str(caught.value)


def test_directories_that_hold_no_circuit(tmp_path):
    refuse(InputError, "no directory to serve", [])
    refuse(InputError, "no such model directory", [tmp_path / "nowhere"])
    refuse(InputError, "there is no config.json in it", [tmp_path])
    refuse(InputError, "a model of type 'gpt2', not a submodel", [zoo.path("induction-gpt2")])


def test_circuit_without_a_tokenizer(directories, tmp_path):
    copied = shutil.copytree(directories["stories"], tmp_path / "circuit")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    refuse(InputError, "cannot load the tokenizer of", [copied])


def test_two_circuits_of_one_name(directories, tmp_path):
    copied = shutil.copytree(directories["stories"], tmp_path / "stories")
    refuse(InputError, "would both be served as 'stories'.*rename one", [directories["stories"], copied])
    refuse(InputError, "would both be served as 'stories'", [copied, f"{copied}/"])


def test_addresses_that_cannot_be_had(directories):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
        refuse(RunError, message, [directories["stories"]], port=port)
    refuse(InputError, "port is 70000; accepted: 0", [directories["stories"]], port=70000)
    refuse(RunError, "cannot listen on no.such.host.invalid:0", [directories["stories"]], host="no.such.host.invalid")


def test_bad_options(directories):
    refuse(InputError, "max_batch_size is 0", [directories["stories"]], max_batch_size=0)
    refuse(InputError, "dtype is 'int8'", [directories["stories"]], dtype="int8")


def test_missing_dependency(directories, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    refuse(InputError, r"needs uvicorn: pip install 'fastcircuit\[serve\]'", [directories["stories"]])

"""Recordings are made on the model's device, as far as that shows without one: torch's calls are stand-ins."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastcircuit.discovery.cuda_graphs import Recorder
from fastcircuit.ops import triton as triton_launcher


@pytest.fixture
def devices(monkeypatch):
    """What was done, and on which device."""
    found = SimpleNamespace(current=0, log=[])
    note = lambda what: found.log.append((what, found.current))  # noqa: E731

    @contextmanager
    def device(chosen):
        before, found.current = found.current, torch.device(chosen).index
        yield
        found.current = before

    @contextmanager
    def graph(recorded, pool, stream):
        assert pool == ("pool", found.current)
        assert stream.device == found.current
        note("recording")
        yield

    def stream():
        note("stream")
        return SimpleNamespace(device=found.current, wait_stream=lambda other: None)

    def cuda_graph():
        note("graph")
        return SimpleNamespace(replay=lambda: note("replay"))

    for name, stand_in in {
        "device": device,
        "graph": graph,
        "Stream": stream,
        "CUDAGraph": cuda_graph,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda chosen: nullcontext(),
        "graph_pool_handle": lambda: ("pool", found.current),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def test_everything_happens_on_the_given_device(devices):
    recorder = Recorder(torch.device("cuda:1"))
    for _ in range(3):
        recorder("step", lambda: devices.log.append(("call", devices.current)))
    done = [what for what, _ in devices.log]
    assert done == ["stream", "stream", "call", "graph", "recording", "call", "replay", "replay"]
    assert {device for _, device in devices.log} == {1}
    assert devices.current == 0


def test_kernels_are_launched_on_the_device_of_their_tensors(devices):
    launch = triton_launcher._on_its_device(lambda first, *rest: devices.current)
    assert launch(SimpleNamespace(device=torch.device("cuda:1")), 2) == 1
    assert launch(torch.ones(1)) == 0
    for op in ("masked_read", "read_norm", "live_product_", "packed_attention_grads", "hard_concrete", "answer_kl"):
        assert hasattr(getattr(triton_launcher, op), "__wrapped__")

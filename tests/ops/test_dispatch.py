"""The ops as torch sees them (opcheck, torch.compile), and what happens when a backend is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcircuit.errors import InputError
from fastcircuit.ops import available_backends, extension, masked_read, masked_read_backward_, unsupported_reasons
from tests.interpreter import FAILS
from tests.ops.conftest import usable_backends

OPS = torch.ops.fastcircuit
USABLE = usable_backends()
ROOT = Path(__file__).parents[2]
TRITON_TESTS = {
    "reads": ["ops/test_masked_read.py", "ops/test_read_norm.py"],
    "the rest": [
        *("ops/test_packed_attention.py", "ops/test_hard_concrete.py", "ops/test_answer_kl.py"),
        "ops/test_live_product.py",
    ],
    "a step": ["discovery/test_triton_step.py"],
    "a GPU's, in small": ["test_gpu.py"],
}

BLOCKED = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("fastcircuit._C", "triton"):
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
import torch
from fastcircuit.errors import InputError
from fastcircuit.ops import available_backends, masked_read, masked_read_backward_
stream, mask = torch.randn(4, 3, 5), torch.rand(2, 4)
expected = torch.einsum("rw,wtd->rtd", mask, stream)
torch.testing.assert_close(masked_read(stream, mask), expected)
masked_read_backward_(expected, stream, mask, torch.zeros(4, 3, 5))
torch.library.opcheck(torch.ops.fastcircuit.masked_read.default, (stream, mask, None, None, "auto"))
assert "blocked by the test" in available_backends()["cpu"], available_backends()
try:
    masked_read(stream, mask, backend="cpu")
except InputError as error:
    assert "fastcircuit._C is missing" in str(error), error
else:
    raise SystemExit("a missing backend was not refused")
"""


def _tensors(dtype=torch.float64, grad=False):
    torch.manual_seed(0)
    shapes = ((5, 3, 4), (2, 5), (3, 4))
    return [torch.rand(s, dtype=dtype, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize("backend", ["auto", *USABLE])
@pytest.mark.parametrize("with_base", [True, False])
def test_opcheck_forward(backend, with_base):
    stream, mask, base = _tensors(grad=True)
    torch.library.opcheck(OPS.masked_read.default, (stream, mask, base if with_base else None, None, backend))


@pytest.mark.parametrize("backend", ["auto", *USABLE])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(backend, wanted):
    stream, mask, _ = _tensors()
    grad_reads = torch.rand(2, 3, 4, dtype=torch.float64)
    torch.library.opcheck(OPS.masked_read_grads.default, (grad_reads, stream, mask, *wanted, None, backend))
    grad_stream = torch.zeros_like(stream) if wanted[0] else None
    torch.library.opcheck(
        OPS.masked_read_backward_.default, (grad_reads, stream, mask, grad_stream, wanted[1], None, backend)
    )


@pytest.mark.parametrize("backend", ["auto", "reference", *{"triton"}.intersection(USABLE)])
def test_opcheck_with_a_live_list(backend):
    stream, mask, base = _tensors(grad=True)
    live = OPS.live_writers(mask.detach(), None, backend)
    torch.library.opcheck(OPS.live_writers.default, (mask.detach(), None, backend))
    torch.library.opcheck(OPS.live_writers.default, (mask.detach(), live[: len(mask)], backend))
    torch.library.opcheck(OPS.masked_read.default, (stream, mask, base, live, backend))
    stream, mask = stream.detach(), mask.detach()
    grads = torch.rand(2, 3, 4, dtype=torch.float64), torch.zeros_like(stream)
    torch.library.opcheck(OPS.masked_read_backward_.default, (grads[0], stream, mask, grads[1], True, live, backend))


@pytest.mark.parametrize("backend", ["auto", *USABLE])
def test_compiled_equals_eager(backend):
    def loss(stream, mask, base):
        return masked_read(stream * 2, mask.sigmoid(), base, backend=backend).sin().sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        inputs = _tensors(grad=True)
        value = run(*inputs)
        value.backward()
        results.append([value.detach(), *(t.grad for t in inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", ["auto", *USABLE])
def test_compiled_backward_accumulates_in_place(backend):
    def run(grad_reads, stream, mask, buffer):
        return masked_read_backward_(grad_reads, stream, mask, buffer[:5], backend=backend)

    stream, mask, _ = _tensors()
    grad_reads = torch.rand(2, 3, 4, dtype=torch.float64)
    buffers = [torch.ones(7, 3, 4, dtype=torch.float64) for _ in range(2)]
    eager = run(grad_reads, stream, mask, buffers[0])
    compiled = torch.compile(run, fullgraph=True)(grad_reads, stream, mask, buffers[1])
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(buffers[1], buffers[0])
    assert torch.equal(buffers[0][5:], torch.ones(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["auto", *USABLE])
def test_the_direct_path_equals_the_dispatched_one(backend):
    stream, mask, base = _tensors(torch.float32)
    assert torch.equal(
        masked_read(stream, mask, base, backend=backend), OPS.masked_read(stream, mask, base, None, backend)
    )


def test_runs_under_fake_tensors_and_on_meta():
    with torch._subclasses.FakeTensorMode():
        assert masked_read(torch.empty(4, 3, 5), torch.empty(2, 4)).shape == (2, 3, 5)
    assert masked_read(torch.empty(4, 3, 5, device="meta"), torch.empty(2, 4, device="meta")).shape == (2, 3, 5)


def test_reasons_are_given_for_every_backend():
    stream = torch.ones(2, 3, 4, dtype=torch.float16)
    assert unsupported_reasons("masked_read", "reference", stream, torch.ones(1, 2), None) == []
    assert unsupported_reasons("masked_read", "cpu", stream, torch.ones(1, 2), None) != []
    for name, why in available_backends().items():
        assert why is None or len(why) > 20, name


@pytest.mark.skipif("cpu" not in USABLE, reason="the C++ extension is not built")
def test_an_instruction_set_can_be_forced_by_name_only():
    with pytest.raises(InputError, match="this machine can run portable"):
        extension.force_isa("avx9000")
    with pytest.raises(InputError, match="float16"):
        masked_read(torch.ones(2, 3, 4, dtype=torch.float16), torch.ones(1, 2), backend="cpu")


def test_a_process_without_the_extension_or_triton():
    run = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", TRITON_TESTS)
def test_triton_kernels_in_the_interpreter(what):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the other tests already run the Triton kernels")
    tests = [str(ROOT / "tests" / file) for file in TRITON_TESTS[what]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", "triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    if FAILS in run.stdout:
        pytest.skip(FAILS)
    assert " passed" in run.stdout

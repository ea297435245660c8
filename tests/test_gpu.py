"""What must hold on a CUDA device as on the CPU; skipped, visibly, without one.

The kernels' tests also run in Triton's interpreter, in small, so that a GPU is not where they fail for the first time.
"""

import dataclasses
import os

import pytest
import torch

from fastcircuit.discovery import Settings
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.planner import largest_bucket, meta_twin, step_bytes
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import Reference
from fastcircuit.masks import Masks
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.ops import (
    answer_kl,
    hard_concrete,
    live_product,
    live_writers,
    masked_read,
    masked_read_backward_,
    packed_attention,
    read_norm,
    read_norm_grad,
    reference,
)
from fastcircuit.ops import triton as triton_launcher
from tests.discovery.test_edge_pruning import make_task
from tests.models.test_masked import pair
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device here")
needs_triton = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="there is no CUDA device here, and Triton is not in its interpreter",
)


def sizes(on_gpu, interpreted):
    """Parameters of a test: those for a GPU, or those that the interpreter has done in seconds."""
    return on_gpu if ON_GPU else interpreted


@needs_triton
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "shape",
    sizes(
        [(1, 1, 1, 1), (36, 26, 64, 768), (5, 13, 11, 17), (1, 30, 13, 64), (120, 41, 8, 512)],
        [(1, 1, 1, 1), (5, 13, 11, 17)],
    ),
)
def test_masked_read_equals_float64_on_the_cpu(shape, backend):
    readers, writers, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    stream, grad = (torch.randn(n, tokens, width, generator=generator, dtype=torch.float64) for n in (writers, readers))
    mask = torch.rand(readers, writers, generator=generator, dtype=torch.float64)
    own = [tensor.float().to(DEVICE) for tensor in (stream, mask, grad)]
    reads = masked_read(own[0], own[1], backend=backend)
    grad_stream = torch.zeros_like(own[0])
    grad_mask = masked_read_backward_(own[2], own[0], own[1], grad_stream, backend=backend)
    expected_stream = torch.zeros_like(stream)
    expected_mask = masked_read_backward_(grad, stream, mask, expected_stream, backend="reference")
    for found, expected in (
        (reads, masked_read(stream, mask, backend="reference")),
        (grad_stream, expected_stream),
        (grad_mask, expected_mask),
    ):
        error = (found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < 1e-3  # float32 lands under 1e-5; TF32 products, where allowed, near 3e-4


PRECISIONS = {
    "ieee": torch.float32,
    "tf32x3": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Relative to the norm: a few rounding steps of what is multiplied or of the result.
ERROR = {"ieee": 1e-6, "tf32x3": 2e-6, "tf32": 2e-3, "bfloat16": 8e-3, "float16": 1e-3, "float64": 1e-13}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    if request.param in triton_launcher.FLOAT32_PRECISIONS:
        triton_launcher.force_float32_precision(request.param)
    yield request.param
    triton_launcher.force_float32_precision(None)


def _assert_near(found, expected, precision):
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < ERROR[precision]


def _drawn(dtype, *shapes):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float64).to(dtype) for shape in shapes]


@needs_triton
@pytest.mark.parametrize("readers", sizes([1, 24, 37, 121, 200], [1, 37]))
@pytest.mark.parametrize("skipping", [False, True])
def test_triton_reads_and_their_gradients(precision, readers, skipping):
    dtype = PRECISIONS[precision]
    tokens, width = sizes((33, 72), (3, 72))
    shapes = (79, tokens, width), (readers, tokens, width), (tokens, width), (79, tokens, width)
    stream, grad, base, start = _drawn(dtype, *shapes)
    mask = _drawn(torch.float64 if dtype == torch.float64 else torch.float32, (readers, 79))[0].clamp(0, 1)
    mask[:, ::3] = 0
    wanted = (torch.arange(readers, device=DEVICE) % 4 != 1).int()
    live = live_writers(mask, wanted, backend="triton") if skipping else None
    wide = [t.double() for t in (stream, mask, base, grad)]
    reads = masked_read(stream, mask, base, live=live, backend="triton")
    read = wanted != 0 if skipping else slice(None)
    _assert_near(reads[read], reference.masked_read(*wide[:3])[read], precision)
    buffer, exact = start.clone(), start.to(torch.float64, copy=True)
    grad_mask = masked_read_backward_(grad, stream, mask, buffer, live=live, backend="triton")
    expected = reference.masked_read_backward_(wide[3], *wide[:2], exact, True, live)
    _assert_near(buffer, exact, precision)
    _assert_near(grad_mask, expected, precision)
    assert torch.equal(reads[read], masked_read(stream, mask, base, live=live, backend="triton")[read])
    again = start.clone()
    assert torch.equal(grad_mask, masked_read_backward_(grad, stream, mask, again, live=live, backend="triton"))
    assert torch.equal(buffer, again)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), sizes([(12, 12, 64), (4, 2, 40), (6, 2, 128)], [(4, 2, 40)]))
@pytest.mark.parametrize(
    ("longest", "rotary", "window"),
    sizes([(16, 0, None), (200, 32, None), (90, 0, 20)], [(16, 0, None), (34, 32, None), (20, 0, 5)]),
)
def test_triton_attention(dtype, heads, kv_heads, width, longest, rotary, window):
    lengths = [longest, 1, longest // 2, longest]
    starts, tokens = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    operands = _drawn(dtype, *((count, tokens, width) for count in (heads, kv_heads, kv_heads)))
    cos, sin, grad = _drawn(dtype, (tokens, rotary), (tokens, rotary), (tokens, heads * width))
    alive = torch.ones(heads, dtype=torch.int32, device=DEVICE)
    alive[1] = 0
    options = {"scale": width**-0.5, "window": window, "alive": alive, "longest": longest}
    results = []
    for wide, backend in ((False, "triton"), (True, "reference"), (False, "triton")):
        leaves = [(part.double() if wide else part).detach().requires_grad_() for part in operands]
        tables = tuple(part.double() if wide else part for part in (cos, sin)) if rotary else None
        out = packed_attention(*leaves, starts.to(DEVICE), rotary=tables, backend=backend, **options)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.double() if wide else grad)))
    for found, exact, again in zip(*results, strict=True):
        # Two products, one after the other.
        assert (found.double() - exact).norm() / exact.norm() < 2 * ERROR[str(dtype).removeprefix("torch.")]
        assert torch.equal(found, again)


@needs_triton
@pytest.mark.parametrize("tokens", sizes([5, 300], [5]))
@pytest.mark.parametrize("centered", [True, False])
def test_triton_norm_of_reads(precision, tokens, centered):
    dtype = PRECISIONS[precision]
    readers, width = sizes((37, 200), (5, 72))
    shapes = (19, tokens, width), (readers, tokens, width), (tokens, width), width, width
    stream, grad, base, weight, bias = _drawn(dtype, *shapes)
    mask = _drawn(torch.float64 if dtype == torch.float64 else torch.float32, (readers, 19))[0].clamp(0, 1)
    operands = (stream, mask, base, weight)
    bias = bias if centered else None
    y, stats = read_norm(*operands, bias, 1e-5, centered=centered, backend="triton")
    wide = [None if t is None else t.double() for t in (*operands, bias)]
    exact_y, exact_stats = reference.read_norm(*wide, 1e-5, centered)
    _assert_near(y, exact_y, precision)
    grad_reads = read_norm_grad(grad, stats, *operands, centered=centered, backend="triton")
    _assert_near(grad_reads, reference.read_norm_grad(grad.double(), exact_stats, *wide[:4], centered), precision)
    assert torch.equal(y, read_norm(*operands, bias, 1e-5, centered=centered, backend="triton")[0])
    assert torch.equal(grad_reads, read_norm_grad(grad, stats, *operands, centered=centered, backend="triton"))


@needs_triton
@pytest.mark.parametrize("by_column", [True, False])
def test_triton_products_of_live_groups(precision, by_column):
    dtype = PRECISIONS[precision]
    groups, rows, inner, columns = sizes((12, 300, 768, 200), (3, 20, 40, 30))
    x, weight, bias, grad = _drawn(
        dtype, (groups, rows, inner), (groups, inner, columns), (groups, 1, columns), (groups, rows, columns)
    )
    weight = weight.mT.contiguous().mT if by_column else weight
    alive = (torch.arange(groups, device=DEVICE) % 3 != 1).int()
    x[1], weight[1], bias[1], grad[1] = (torch.nan,) * 4
    on, leaf = alive != 0, x.requires_grad_()
    out = live_product(leaf, weight, bias, alive, backend="triton")
    (ours,) = torch.autograd.grad(out, leaf, grad)
    wide = [tensor.detach().double()[on] for tensor in (x, weight, bias, grad)]
    _assert_near(out[on], torch.baddbmm(wide[2], wide[0], wide[1]), precision)
    _assert_near(ours[on], wide[3] @ wide[1].mT, precision)
    for found in (out, ours):
        assert not found[~on].any()
    assert torch.equal(out, live_product(leaf, weight, bias, alive, backend="triton"))


@needs_triton
def test_triton_answers(precision):
    dtype = PRECISIONS[precision]
    rows, tokens = sizes((35, 1000), (5, 300))
    hidden, weight, log_probs, grad = _drawn(dtype, (rows, 96), (tokens, 96), (rows, tokens), rows)
    log_probs = log_probs.to(torch.float64 if dtype == torch.float64 else torch.float32).log_softmax(-1)
    kl = answer_kl(hidden.requires_grad_(), weight, log_probs, backend="triton")
    (ours,) = torch.autograd.grad(kl, hidden, grad.to(kl.dtype))
    wide = hidden.detach().double().requires_grad_()
    exact = reference.answer_kl(wide, weight.double(), log_probs.double())[0]
    _assert_near(kl, exact, precision)
    _assert_near(ours, torch.autograd.grad(exact, wide, grad.double())[0], precision)


@needs_triton
def test_triton_samples_are_the_references():
    log_alpha, seed = torch.linspace(-5, 5, 40_001, device=DEVICE), torch.tensor([2**40 + 5, 3], device=DEVICE)
    numbers = {"temperature": 2 / 3, "stretch": (-0.1, 1.1), "epsilon": 1e-6}
    ours, expected = (hard_concrete(log_alpha, seed, **numbers, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@needs_gpu
def test_a_captured_step_draws_anew_and_skips_without_the_host():
    """Sampling, listing and reading in one CUDA graph: counts stay on the device, and each replay has its own."""
    stream = torch.randn(40, 16, 64, device="cuda")
    seed, log_alpha = torch.tensor([7, 0], device="cuda"), torch.full((5 * 40,), -3.0, device="cuda")
    numbers = {"temperature": 2 / 3, "stretch": (-0.1, 1.1), "epsilon": 1e-6}

    def step():
        mask = hard_concrete(log_alpha, seed, **numbers, backend="triton")[0].view(5, 40)
        live = live_writers(mask, backend="triton")
        seed[1] += 1
        return mask, live, masked_read(stream, mask, live=live, backend="triton")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask, live, reads = step()
    counts = set()
    for _ in range(5):
        graph.replay()
        torch.testing.assert_close(reads, torch.einsum("rw,wtd->rtd", mask, stream), atol=1e-4, rtol=1e-4)
        assert live[1] == (mask != 0).any(0).sum()
        counts.add(tuple(mask.flatten().tolist()))
    assert len(counts) == 5


@needs_gpu
def test_streams_of_more_than_2_to_the_31_numbers():
    """The last writers lie beyond 32-bit offsets; only they are read, and only their gradient is not 0."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    stream = torch.zeros(2200, 1000, 1024, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(3, 2200, device="cuda")
    stream[-2:], mask[:, -2:] = 1.5, 0.5
    buffer = torch.empty_like(stream)
    for live in (None, live_writers(mask, backend="triton")):
        assert masked_read(stream, mask, live=live, backend="triton").eq(1.5).all()
        grad = torch.ones(3, 1000, 1024, device="cuda", dtype=torch.bfloat16)
        buffer.zero_()
        grad_mask = masked_read_backward_(grad, stream, mask, buffer, live=live, backend="triton")
        assert buffer[-2:].eq(1.5).all()
        assert buffer[0].eq(0).all()
        torch.testing.assert_close(grad_mask[:, -2:], torch.full((3, 2), 1.5 * 1000 * 1024, device="cuda"))


@needs_gpu
@pytest.mark.parametrize("name", ["gpt2", "llama-biases-head-dim", "mistral-window"])
def test_masked_models_equal_the_cpu(name):
    results = []
    for device in ("cpu", "cuda"):
        model = MaskedCausalLM(tiny_model(name, torch.float32).to(device))
        clean, corrupted = pair()
        edge = torch.rand(model.graph.num_edges, generator=torch.Generator().manual_seed(1))
        masks = Masks(edge.to(device).requires_grad_())
        logits = model(clean, corrupted_input_ids=corrupted, masks=masks).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), masks.edge)
        results.append((logits.cpu(), gradient.cpu()))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-2


SETTINGS = Settings(
    steps=12, batch_size=4, learning_rate=0.3, learning_rate_warmup=2, sparsity_warmup=8, initial_log_alpha=1.0
)
RUNS = {
    # what: the model, settings, budgets of the cache, execution
    "gpt2": ("gpt2", {}, None, Execution("graph")),
    "grouped heads": ("llama", {"node_masks": False}, None, Execution("graph")),
    "window, mean ablation": ("mistral-window", {"ablation": "mean"}, None, Execution("graph")),
    "micro-batches": ("gpt2", {"node_target": 0.5}, None, Execution("graph", 3)),
    "recomputed": ("llama", {}, None, Execution("graph", recompute=True)),
    "host memory": ("llama", {}, Budgets(9000, 9000), Execution("graph")),
    "fixed": ("gpt2", {}, None, Execution("fixed")),
}


def cuda_run(name, changes=None, budgets=None, execution=None, dtype=torch.float32, device="cuda"):
    model = MaskedCausalLM(tiny_model(name, dtype).to(device))
    settings = dataclasses.replace(SETTINGS, **(changes or {}))
    reference = Reference(model, make_task().split("train"), settings.ablation, budgets=budgets)
    return EdgePruning(reference, 40, settings, execution=execution)


def assert_same_run(found, expected, tolerance=1e-3):
    """The same losses, to the rounding of float32 that twelve steps let grow."""
    losses, expected_losses = (torch.tensor(run.history) for run in (found, expected))
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_kernels_step_is_that_of_plain_torch(name):
    """The same numbers drawn: losses and log-alphas after twelve steps, samples of 0 left out or not."""
    runs = []
    for backend in ("triton", "reference"):
        model = MaskedCausalLM(tiny_model(name, torch.float32).to("cuda"), backend=backend)
        own = Reference(model, make_task().split("train"))
        runs.append(EdgePruning(own, 40, SETTINGS, execution=Execution("fixed")))
    runs[1].parameters.backend = "reference"
    runs[1].stepper = runs[1]._stepper(Execution("fixed"))
    for run in runs:
        run.run()
    assert_same_run(*runs)


@needs_gpu
@pytest.mark.parametrize("case", RUNS)
def test_a_recorded_run_is_the_dynamic_one(case):
    name, changes, budgets, execution = RUNS[case]
    found, expected = cuda_run(name, changes, budgets, execution), cuda_run(name, changes, None, Execution("dynamic"))
    for run in (found, expected):
        run.run()
    assert_same_run(found, expected)
    if execution.step == "graph":
        graphs = found.stepper._call._graphs
        assert graphs["begin"] is not None
        assert graphs["finish"] is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device here")
def test_a_run_on_the_second_device_is_that_of_the_first():
    found, expected = (cuda_run("gpt2", execution=Execution("graph"), device=f"cuda:{i}") for i in (1, 0))
    for run in (found, expected):
        run.run()
    assert_same_run(found, expected)


@needs_gpu
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_products_that_are_left_out_change_nothing(name, monkeypatch):
    """A recorded run is the dense one; and a step in bfloat16, bit for bit, the one that leaves out no product."""
    few, runs = {"initial_log_alpha": -1.0}, []
    for gated in (True, False):
        runs.append(cuda_run(name, few, execution=Execution("graph")))
        runs[-1].model.gated = gated
        runs[-1].run()
    assert_same_run(*runs)
    launch, found = triton_launcher.live_product_, []
    for of_all in (False, True):
        if of_all:
            every = lambda *args: launch(*args[:4], torch.ones_like(args[4]), args[5])  # noqa: E731
            monkeypatch.setattr(triton_launcher, "live_product_", every)
        run = cuda_run(name, few, execution=Execution("fixed"), dtype=torch.bfloat16)
        run.model.gated = True
        run.step()
        found.append((run.stepper.static.kl, run.stepper.static.gradient))
    for skipping, whole in zip(*found, strict=True):
        assert torch.equal(skipping, whole)


@needs_gpu
def test_the_step_waits_for_nothing():
    run = cuda_run("gpt2", {"batch_size": 64}, execution=Execution("graph"))  # all examples: one shape
    for _ in range(8):
        run.step()
    before = set(run.stepper._call._graphs)
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(run.stepper._call._graphs) == before


@needs_gpu
def test_a_recorded_run_resumes(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    whole, first, second = (cuda_run("gpt2", execution=Execution("graph")) for _ in range(3))
    whole.run()
    for _ in range(7):
        first.step()
    first._flush(None)
    first.save(path)
    second.resume(path)
    second.run()
    assert_same_run(second, whole, 1e-5)


@needs_gpu
@pytest.mark.parametrize("recording", [False, True])
def test_running_out_of_memory_halves_the_micro_batch(recording):
    run, expected, notes = cuda_run("gpt2", execution=Execution("graph")), cuda_run("gpt2"), []
    run.on_note = notes.append
    expected.run()
    for _ in range(4):
        run.step()
    whole = Reference.divergence

    def divergence(self, read, log_probs):
        if run.micro_batch > 2 and torch.cuda.is_current_stream_capturing() == recording:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # the real error
        return whole(self, read, log_probs)

    Reference.divergence = divergence
    try:
        run.stepper.reset()
        run.run()
    finally:
        Reference.divergence = whole
    assert run.micro_batch == 2
    assert len(notes) == 1
    assert_same_run(run, expected)


@needs_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_the_predicted_memory_is_what_the_device_counts(recompute):
    from bench.cases import gpu as case
    from fastcircuit.benchmarks.models import Shape

    shape = Shape(layers=4, batch=16, vocabulary=8000)
    model = MaskedCausalLM(case.gpt2_on(shape, "cuda", torch.bfloat16))
    run = case.run_of(model, shape, Execution("fixed", recompute=recompute))
    run.step()
    lengths, counts = run.reference.lengths, run.reference.counts
    bucket = largest_bucket(lengths, counts, shape.batch, fixed=True)
    predicted = step_bytes(meta_twin(model), bucket, recompute, shape.vocabulary, run.settings, model.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.stepper.compute(1, run.batch_indices(1), shape.batch, run.generator.manual_seed(1))
    torch.cuda.synchronize()
    inputs = sum(value.numel() * value.element_size() for value in _input_tensors(run))
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before + inputs, rel=0.1)


def _input_tensors(run):
    """The step's buffers, which were there before it and are part of the prediction."""
    (inputs,) = run.stepper._inputs.values()
    return [inputs.numbers, inputs.rows, inputs.log_probs]

"""The static step takes the steps of the dynamic one, on any buckets and micro-batches, and asks for no number."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastcircuit.discovery import Settings
from fastcircuit.discovery.buckets import Bucket, round_up
from fastcircuit.discovery.edge_pruning import EdgePruning
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.parameters import MaskParameters
from fastcircuit.discovery.static_step import Inputs, StaticStep
from fastcircuit.errors import InputError, RunError
from fastcircuit.evaluation.cache import Budgets
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.ops import cpu
from fastcircuit.ops.backends import missing_reason
from tests.discovery.test_edge_pruning import make_task
from tests.models.tiny import TINY, tiny_model

SETTINGS = Settings(
    steps=5, batch_size=4, learning_rate=0.5, learning_rate_warmup=1, sparsity_warmup=4, initial_log_alpha=1.0
)
CASES = {
    # what: the model, settings, budgets of the cache (None: everything on the device), answer tokens
    "gpt2": ("gpt2", {}, None, None),
    "grouped heads": ("llama", {"node_masks": False}, None, None),
    "window": ("mistral-window", {"ablation": "mean"}, None, None),
    "writer target": ("llama", {"node_target": 0.5, "sparsity_estimate": "expected"}, None, None),
    "restricted answers": ("gpt2", {"linear_term": False, "clip_norm": None}, None, (1, 2, 3)),
    "zero ablation": ("gpt2", {"ablation": "zero", "output_bias": "kept"}, None, None),
    "host memory": ("llama", {}, Budgets(9000, 9000), None),
}


def run_of(case, execution, steps=None, backend="auto"):
    name, changes, budgets, answer_tokens = CASES[case]
    settings = dataclasses.replace(SETTINGS, **changes)
    model = MaskedCausalLM(tiny_model(name), backend=backend)
    examples = make_task().split("train")
    reference = Reference(
        model, examples, settings.ablation, settings.output_bias, answer_tokens=answer_tokens, budgets=budgets
    )
    run = EdgePruning(reference, 40, settings, execution=execution)
    run.parameters.double()  # the multipliers too
    for _ in range(steps or settings.steps):
        run.step()
    run._flush(None)
    return run


def assert_same_run(found, expected):
    """The same losses and updates, up to the rounding of float64 over a few steps."""
    torch.testing.assert_close(torch.tensor(found.history), torch.tensor(expected.history), rtol=1e-9, atol=1e-11)
    for own, other in zip(found.parameters.parameters(), expected.parameters.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_fixed_step_is_the_dynamic_one(case):
    expected = run_of(case, Execution(step="dynamic"))
    assert expected.parameters.edge.std() > 0.05  # the steps moved something
    assert_same_run(run_of(case, Execution(step="fixed")), expected)


@pytest.mark.skipif(missing_reason("cpu") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("step", ["dynamic", "fixed"])
@pytest.mark.parametrize("case", ["gpt2", "grouped heads", "window"])
def test_the_steps_on_the_cpu_kernels_are_those_of_the_reference(case, step, monkeypatch):
    used = set()
    for op in ("masked_read", "masked_read_backward_", "packed_attention"):
        whole = getattr(cpu, op)
        monkeypatch.setattr(cpu, op, lambda *args, op=op, whole=whole: used.add(op) or whole(*args))
    expected = run_of(case, Execution(step), backend="reference")
    assert not used
    assert_same_run(run_of(case, Execution(step), backend="cpu"), expected)
    assert used == {"masked_read", "masked_read_backward_", "packed_attention"}


@pytest.mark.parametrize(("step", "micro_batch"), [("dynamic", 1), ("dynamic", 3), ("fixed", 1), ("fixed", 3)])
def test_micro_batches_add_up_to_the_batch(step, micro_batch):
    found = run_of("host memory", Execution(step, micro_batch, recompute=True))
    assert_same_run(found, run_of("host memory", Execution(step="dynamic")))


def test_batches_fall_into_a_few_buckets():
    run = run_of("gpt2", Execution(step="fixed"))
    batches = [run.batch_indices(step) for step in range(200)]
    buckets = {Bucket.of(run.reference, indices, 4) for indices in batches}
    assert 1 < len(buckets) <= 6
    assert len(buckets) < len({int(run.reference.lengths[indices].sum()) for indices in batches})


@pytest.mark.parametrize("finest", [8, 16])
def test_rounding_up_wastes_at_most_an_eighth(finest):
    sizes = [round_up(count, finest) for count in range(1, 5000)]
    assert all(count <= size < count + max(finest, count / 4) for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 60


def test_what_fills_a_bucket_changes_nothing():
    """NaN in the fill's weights' way would show: the fill is a twin of a real token, and its answers weigh nothing."""
    run = run_of("gpt2", Execution(step="fixed"), steps=1)
    static, indices = run.stepper.static, torch.tensor([2, 7])
    results = []
    for tokens, answers, rows, longest in ((0, 0, 2, 6), (5, 4, 2, 6), (30, 9, 6, 16)):
        lengths, counts = run.reference.lengths[indices], run.reference.counts[indices]
        bucket = Bucket(rows, longest, int(lengths.sum()) + tokens, int(counts.sum()) + answers, False)
        inputs = filled(run.reference, bucket, indices)
        static.begin()
        static.accumulate(inputs)
        results.append((static.kl.clone(), static.gradient.clone()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-13)


def filled(reference, bucket, indices):
    inputs = Inputs.empty(bucket, reference)
    bucket.fill(inputs.numbers, reference, indices, len(indices))
    parts = bucket.split(inputs.numbers)
    reference.cache.gather(parts["token_rows"], parts["answer_rows"], inputs.rows, inputs.log_probs)
    return inputs


class NothingFromTheHost(TorchDispatchMode):
    """Fails on any operation that needs a number of the device, or that touches a tensor which is not on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was asked of the device"
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, out))
        for tensor in flat:
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta" or tensor.dim() == 0, f"{func} on a host tensor {tensor.shape}"
        return out


@pytest.mark.parametrize("node_masks", [True, False])
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("gpt2", False),
        ("llama", False),
        ("mistral-window", False),
        ("qwen2-mixed-window", False),
        ("gpt2", True),
        ("llama", True),
    ],
)
def test_a_micro_batch_asks_the_host_for_nothing(name, compiled, node_masks, monkeypatch):
    """On meta tensors, which have shapes alone: what depends on a number fails, and so does what is on the host.

    ``compiled``: the ops that a GPU has kernels for, of which there are shapes too.
    """
    device = torch.device("meta")
    reference = Reference(MaskedCausalLM(tiny_model(name)), make_task().split("train"))
    run = EdgePruning(reference, 40, dataclasses.replace(SETTINGS, node_masks=node_masks), execution=Execution("fixed"))
    if compiled:
        run.parameters.backend = "reference"
        run.stepper = run._stepper(Execution("fixed"))
        monkeypatch.setattr("fastcircuit.evaluation.reference.is_compiled", lambda *operands: True)
    inputs = filled(reference, Bucket.of(reference, torch.arange(4), 4), torch.arange(4))
    static = to_meta(run, name, device)
    static.model.fused = compiled
    inputs = Inputs(inputs.bucket, inputs.numbers.to(device), inputs.rows.to(device), inputs.log_probs.to(device))
    static.begin()  # what is asked for once, and kept
    static.accumulate(inputs)
    with NothingFromTheHost():
        static.begin()
        static.accumulate(inputs)
    with pytest.raises((RuntimeError, AssertionError)), NothingFromTheHost():
        run.model.final_read(
            inputs.bucket.split(inputs.numbers)["token_ids"],
            inputs.bucket.packing(inputs.bucket.split(inputs.numbers)),
            reference.states(inputs.rows),
            run.parameters.sample(static.drawn),
            inputs.bucket.split(inputs.numbers)["answers"],
            skip_zeros=True,
        )


def to_meta(run, name, device):
    """The run's static step with every tensor, the model's too, on the meta device."""
    static = run.stepper.static
    kind, config = TINY[name]
    with device:
        hf_model = kind(config).double()
    static.model = run.model = static.reference.model = MaskedCausalLM(hf_model)
    run.parameters.to(device)
    for key, value in vars(static).items():
        if isinstance(value, torch.Tensor):
            setattr(static, key, value.to(device))
    return static


@pytest.mark.parametrize("case", ["gpt2", "grouped heads", "writer target", "restricted answers"])
def test_the_update_asks_the_host_for_nothing(case, monkeypatch):
    """On fake tensors, which the fused optimizer takes: a number asked of one raises."""
    run = run_of(case, Execution("fixed"), steps=1)
    monkeypatch.setattr(MaskParameters, "to", lambda self, device: self)  # which fake tensors cannot do
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = MaskParameters(run.model.graph, run.settings, 40, torch.Generator(), torch.float64)
        static = StaticStep(run.reference, parameters, parameters.optimizer(on_device=True))
        static.finish()
        static.finish()
        assert isinstance(static.history, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            static.kl.item()


def test_a_fixed_run_resumes_to_the_same_bits_and_a_dynamic_one_may_go_on_with_it(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    whole = run_of("gpt2", Execution("fixed", 3))
    run_of("gpt2", Execution("fixed", 3), steps=3).save(path)
    for step in ("fixed", "dynamic"):
        resumed = run_of("gpt2", Execution(step, 3), steps=1)
        resumed.resume(path)
        assert resumed.step_number == 3
        resumed.run()
        if step == "fixed":
            assert torch.equal(resumed.parameters.edge, whole.parameters.edge)
            assert resumed.history == whole.history
        else:
            assert_same_run(resumed, whole)


@pytest.mark.parametrize("step", ["dynamic", "fixed"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["cuda", "cpu", "mapping"],
)
def test_out_of_memory_halves_the_micro_batch_and_the_result_stays(monkeypatch, step, error):
    expected, notes = run_of("gpt2", Execution("dynamic")), []
    run = run_of("gpt2", Execution(step), steps=2)
    run.on_note = notes.append
    whole, calls = MaskedCausalLM.unembed, []

    def unembed(self, stream):
        calls.append(stream)
        if len(calls) > 2 and run.micro_batch > 1:
            raise error
        return whole(self, stream)

    monkeypatch.setattr(MaskedCausalLM, "unembed", unembed)
    run.run()
    assert run.micro_batch == 1
    assert len(notes) == 2
    assert notes[0].startswith("out of memory at step ")
    assert "2 of 4 examples at a time" in notes[0]
    assert_same_run(run, expected)


def test_out_of_memory_with_one_example_ends_the_run_and_keeps_it(monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run, whole = run_of("gpt2", Execution("dynamic"), steps=3), run_of("gpt2", Execution("dynamic"))

    def unembed(self, stream):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(MaskedCausalLM, "unembed", unembed)
        with pytest.raises(RunError, match=r"step 3: out of memory with one example at a time; .*checkpoint is .*che"):
            run.run(path)
    resumed = run_of("gpt2", Execution("dynamic"), steps=1)
    resumed.resume(path)
    resumed.run()
    assert torch.equal(resumed.parameters.edge, whole.parameters.edge)


def test_an_error_that_is_not_about_memory_is_not_caught(monkeypatch):
    run = run_of("gpt2", Execution("dynamic"), steps=1)

    def unembed(self, stream):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(MaskedCausalLM, "unembed", unembed)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.step()


def test_a_step_that_cannot_be_is_refused_by_name():
    model = MaskedCausalLM(tiny_model("gpt2"))
    reference = Reference(model, make_task().split("train"))
    compat = dataclasses.replace(SETTINGS, upstream_compat=True)
    assert EdgePruning(reference, 40, compat).stepper.__class__.__name__ == "DynamicStepper"
    for settings, execution, message in (
        (compat, "fixed", "step 'fixed' cannot run this: upstream_compat"),
        (SETTINGS, "graph", "needs a CUDA device; the model is on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            EdgePruning(reference, 40, settings, execution=Execution(execution))
    with pytest.raises(InputError, match="accepted: auto, dynamic, fixed, graph"):
        Execution("static")
    with pytest.raises(InputError, match="micro_batch is 0; it must be at least 1"):
        Execution(micro_batch=0)

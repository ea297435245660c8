"""What is measured on a GPU: ceilings, training steps and whole runs. Everything takes a device, so that the CPU can
check in small that it works."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastcircuit.benchmarks.baselines.edge_pruning_step import PublishedEdgePruning
from fastcircuit.benchmarks.baselines.plain_torch_step import plain_kl
from fastcircuit.benchmarks.models import Shape, random_model, random_pairs
from fastcircuit.discovery.discovery import Discovery, discover
from fastcircuit.discovery.edge_pruning import EdgePruning, Report
from fastcircuit.discovery.execution import Execution
from fastcircuit.discovery.settings import Settings
from fastcircuit.evaluation.reference import Reference
from fastcircuit.models.masked import MaskedCausalLM
from fastcircuit.ops import live_product, live_product_
from fastcircuit.ops.live_product import pays
from fastcircuit.tasks.task import Task

Step = Callable[[], object]
GPT2_SMALL_32 = Shape(batch=32)
# The pairs of IOI have about this many tokens.
IOI_TOKENS = 16
STEPS_AHEAD = 2000  # of a run whose steps are timed: far from its end, so that rates and targets hardly move


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's shape; CodeLlama-13B's unless said otherwise."""

    layers: int = 40
    heads: int = 40
    width: int = 5120
    mlp: int = 13824
    vocabulary: int = 32016


CODELLAMA_13B = LlamaShape()


@dataclass(frozen=True)
class ProductShape:
    """``[tokens, inner] @ [inner, columns]`` of each group; ``by_column``: as a linear layer keeps its weights."""

    groups: int
    tokens: int
    inner: int
    columns: int
    by_column: bool

    @property
    def flops_per_byte(self) -> float:
        """Of one group in half precision, everything moved once."""
        numbers = self.tokens * self.inner + self.inner * self.columns + self.tokens * self.columns
        return self.tokens * self.inner * self.columns / numbers


PRODUCTS = {
    "GPT-2 small, heads": ProductShape(12, 2048, 768, 64, False),
    "GPT-2 small, outputs of heads": ProductShape(12, 2048, 64, 768, False),
    "GPT-2 small, MLP up": ProductShape(1, 2048, 768, 3072, False),
    "GPT-2 small, MLP down": ProductShape(1, 2048, 3072, 768, False),
    "GPT-2 small, MLP up, 512 tokens": ProductShape(1, 512, 768, 3072, False),
    "Llama 13B, heads": ProductShape(40, 256, 5120, 128, True),
    "Llama 13B, outputs of heads": ProductShape(40, 256, 128, 5120, True),
    "Llama 13B, MLP up": ProductShape(1, 256, 5120, 13824, True),
    "Llama 13B, MLP down": ProductShape(1, 256, 13824, 5120, True),
}


def random_llama(shape: LlamaShape, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, made on the device."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def milliseconds(step: Step, device: str, repeats: int, warm_up: int = 3) -> float:
    """Median time of a step; on a GPU that of the device, each step between two events."""
    for _ in range(warm_up):
        step()
    if device == "cpu":
        return statistics.median(_wall(step) for _ in range(repeats)) * 1e3
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def measured(make: Callable[[], Step], device: str, repeats: int, weights: int = 0, warm_up: int = 3) -> dict:
    """Median milliseconds of a step, and the most bytes allocated above ``weights`` from its making on.

    A graph's replay allocates nothing that torch would count, its first step and its recording do. On the CPU nobody
    counts, and the bytes are None.
    """
    if device != "cpu":
        gc.collect()  # a run refers to itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    took = milliseconds(make(), device, repeats, warm_up)
    return {"ms": took, "peak_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated() - weights}


def ceilings(device: str, size: int, repeats: int = 20) -> dict[str, float]:
    """What the device reaches: bytes per second of a copy of ``size**2`` floats, bfloat16 FLOP per second of a product.

    A copy reads and writes; both are counted.
    """
    source = torch.randn(size, size, device=device)
    target, a = torch.empty_like(source), source.to(torch.bfloat16)
    copied = milliseconds(lambda: target.copy_(source), device, repeats)
    product = milliseconds(lambda: a @ a, device, repeats)
    return {
        "copy_gb_per_s": 2 * source.numel() * 4 / copied / 1e6,
        "bf16_tflop_per_s": 2 * size**3 / product / 1e9,
    }


def product_times(
    shape: ProductShape, dtype: torch.dtype, device: str, clock: Callable[[Step], float]
) -> list[dict[str, object]]:
    """Forward and backward of a product with its operands as the static step has them: torch's, which does all groups,
    and :func:`live_product` with all of them alive, every second one and none. Both are compared first.

    Args:
        clock: how long a call takes, in milliseconds.
    """
    draw = lambda *size: torch.randn(size, device=device).to(dtype)  # noqa: E731
    groups, tokens, inner, columns = shape.groups, shape.tokens, shape.inner, shape.columns
    x, grad, bias = draw(groups, tokens, inner), draw(groups, tokens, columns), draw(groups, 1, columns)
    weight = draw(groups, columns, inner).mT if shape.by_column else draw(groups, inner, columns)
    back, out, grad_x = weight.mT, torch.empty_like(grad), torch.empty_like(x)
    every = torch.ones(groups, dtype=torch.int32, device=device)
    flags = {"all": every, "half": (torch.arange(groups, device=device) % 2).int(), "none": torch.zeros_like(every)}

    def gated(direction: str, alive: Tensor) -> None:
        if direction == "forward":
            live_product_(out, x, weight, bias, alive, zeros=False)
        else:
            live_product_(grad_x, grad, back, None, alive, zeros=False)

    dense: dict[str, Step] = {
        "forward": lambda: torch.baddbmm(bias, x, weight, out=out),
        "backward": lambda: torch.bmm(grad, back, out=grad_x),
    }
    ours, plain = live_product(x, weight, bias, every), torch.baddbmm(bias, x, weight)
    # TF32 or bfloat16, whichever is less exact: eight bits.
    assert (ours - plain).norm() <= 2**-7 * plain.norm()
    rows = []
    for direction, call in dense.items():
        times = {"torch": clock(call)}
        for name, alive in flags.items():
            times[name] = clock(lambda d=direction, a=alive: gated(d, a))
        about = {"direction": direction, "flops_per_byte": shape.flops_per_byte, "pays": pays(x, weight)}
        rows.append({**about, **{f"{name}_ms": time for name, time in times.items()}})
    return rows


def run_of(masked: MaskedCausalLM, shape: Shape, execution: Execution, log_alpha: float = 10.0) -> EdgePruning:
    """A run of which steps can be timed; at a log-alpha of 10 every mask is on and nothing can be skipped."""
    settings = Settings(
        steps=STEPS_AHEAD, batch_size=shape.batch, initial_log_alpha=log_alpha, sparsity_warmup=STEPS_AHEAD
    )
    return EdgePruning(Reference(masked, random_pairs(shape)), 1000, settings, execution=execution)


def fastcircuit_step(model: object, shape: Shape, kind: str) -> Step:
    """Our step, carried out in one of the ways there are (see :class:`Execution`)."""
    return run_of(MaskedCausalLM(model), shape, Execution(kind)).step


def plain_step(model: object, shape: Shape, compiled: bool) -> Step:
    """The gradient alone, without an optimizer, in plain torch; eager or compiled."""
    run = run_of(MaskedCausalLM(model), shape, Execution("dynamic"))
    batch = run.reference.batch(torch.arange(shape.batch))
    mask = torch.ones(run.model.graph.num_edges, dtype=run.model.mask_dtype, device=run.model.device)
    tokens, kl = batch.token_ids.view(shape.batch, -1), plain_kl(run.model, compiled)

    def gradient() -> Tensor:
        leaf = mask.detach().requires_grad_()
        loss = kl(leaf, tokens, batch.ablated, batch.answers.tokens, batch.answers.log_probs)
        return torch.autograd.grad(loss, leaf)[0]

    return gradient


def published_step(model: object, shape: Shape, device: str) -> Step:
    """The published method's step on the device."""
    published, pairs = PublishedEdgePruning(model, steps=STEPS_AHEAD), random_pairs(shape)
    batch = {
        "input_ids": pairs.input_ids.to(device),
        "corrupted_input_ids": pairs.corrupted_input_ids.to(device),
        "start": torch.full((shape.batch,), shape.tokens - 1),
        "end": torch.full((shape.batch,), shape.tokens),
    }
    return lambda: published.training_step(batch)


def step_at_sparsities(
    model: object, shape: Shape, device: str, log_alphas: list[float], repeats: int, gated: bool | None = None
) -> list[dict]:
    """Time of our step with masks that are on with less and less probability.

    Args:
        gated: whether products of what is dead are left out; None: where it pays.
    """
    masked, rows = MaskedCausalLM(model), []
    masked.gated = gated
    for log_alpha in log_alphas:
        run = run_of(masked, shape, Execution(), log_alpha)
        took = milliseconds(run.step, device, repeats)
        run._flush(None)
        rows.append({"log_alpha": log_alpha, "sparsity": run.report().edge_sparsity, "step_ms": took})
    return rows


def whole_run(model: object, shape: Shape, pairs: int, steps: int) -> tuple[Discovery, float, list[Report]]:
    """A whole run on IOI-shaped pairs of random tokens: the circuit, seconds of wall time, and its reports."""
    examples = random_pairs(replace(shape, batch=pairs, tokens=min(IOI_TOKENS, shape.tokens)))
    task = Task("random pairs", {"train": examples}, None, "random tokens in the shape of IOI's prompts")
    settings = Settings(batch_size=shape.batch, refine=False).changed({"steps": steps})
    reports: list[Report] = []
    start = time.perf_counter()
    found = discover(MaskedCausalLM(model), task, sparsity=0.95, settings=settings, on_report=reports.append)
    return found, time.perf_counter() - start, reports


def large_step(masked: MaskedCausalLM, batch: int, tokens: int, micro_batch: int) -> Step:
    """Our step of a large model, recomputing, some examples at a time."""
    shape = Shape(vocabulary=masked.config.vocab_size, batch=batch, tokens=tokens)
    return run_of(masked, shape, Execution(micro_batch=micro_batch, recompute=True)).step


def gpt2_on(shape: Shape, device: str, dtype: torch.dtype) -> object:
    """The random GPT-2 of a shape on a device."""
    return random_model(shape).to(device=device, dtype=dtype)


def _wall(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start

"""How much faster a submodel is than the model it came from, and how much faster it could be at most."""

import copy
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, DynamicCache, StaticCache

from fastcircuit.errors import InputError, RunError
from fastcircuit.models.masked import first_line
from fastcircuit.submodel.modeling_circuit import CACHE

BATCHES = (1, 8, 32)
DECODED = 8  # tokens decoded per round
LEAST_SECONDS = 0.3  # a row is measured for as long at least: clocks of shared machines change for tenths of a second
NOISE = 0.1  # what a measured ratio may lie above its bound before it is called an error

Call = Callable[[], object]
OnRow = Callable[[int, int], None]
Ready = Callable[[], Call]  # makes ready, untimed, and gives what is to be timed


@dataclass(frozen=True)
class SpeedRow:
    """One phase at one batch size: medians and 95th percentiles in milliseconds (decode: per token).

    Args:
        tokens: length of the prompts.
        speedup: median of the original over that of the submodel.
        bound: the largest speed-up the work left allows: the ratio of floating-point operations, of bytes moved, or of
            operations launched, whichever is largest.
    """

    tokens: int
    phase: str
    batch: int
    original_ms: float
    original_p95_ms: float
    submodel_ms: float
    submodel_p95_ms: float
    speedup: float
    bound: float

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Work:
    """What a call does: floating-point operations in products, bytes of all operands and results, operations."""

    flops: int
    bytes: int
    operations: int

    def ratio(self, other: "Work") -> float:
        """How many times the work of ``other`` this is, in the resource where it is most."""
        return max(
            mine / max(theirs, 1)
            for mine, theirs in (
                (self.flops, other.flops),
                (self.bytes, other.bytes),
                (self.operations, other.operations),
            )
        )


def measure_speed(
    original: Any,
    submodel: Any,
    tokens: int = 64,
    batches: Sequence[int] = BATCHES,
    rounds: int = 10,
    compiled: bool = False,
    on_row: OnRow | None = None,
) -> list[SpeedRow]:
    """Both models under one protocol: prefill of random prompts, then decoding token by token with a cache.

    Both give logits of the last position only, take turns within a round, and run twice before anything is timed.
    There are prefill rows alone for a circuit with the logits of its answer tokens only, which cannot decode, and for
    prompts too short to decode the last ones of their tokens.

    Args:
        original, submodel: Hugging Face decoders on the same device, with the same vocabulary.
        tokens: length of the prompts; where one of the models takes fewer, as many as both take.
        rounds: at least; more of them until a row has been measured for ``LEAST_SECONDS``.
        compiled: time ``torch.compile`` of both too, which decodes with a static cache.
        on_row: called with the rows measured so far and how many there are.

    Raises:
        InputError: the models have different vocabularies. RunError: ``compiled``, and torch cannot compile here.
    """
    _check_same_vocabulary(original.config, submodel.config)
    if compiled:
        _check_compiles(original.device)
    tokens = min(tokens, *(most_tokens(model.config) for model in (original, submodel)))
    phases = {"prefill": _prefill}
    if tokens > DECODED and getattr(submodel.config, "answer_tokens", None) is None:
        phases["decode"] = _decode
    if compiled:
        phases |= {f"{name}, compiled": _COMPILED[make] for name, make in phases.items()}
    rows: list[SpeedRow] = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, original.config.vocab_size, (batch, tokens), generator=generator).to(original.device)
        for phase, make in phases.items():
            rows.append(_row(phase, ids, [make(model, ids) for model in (original, submodel)], rounds))
            if on_row is not None:
                on_row(len(rows), len(batches) * len(phases))
    return rows


def most_tokens(config: Any) -> int:
    """The longest input a model takes, by its positions and, for a circuit, by its constants."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "constant_positions"))
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)


def check_bounds(rows: Sequence[SpeedRow]) -> None:
    """RunError when a measured speed-up lies above its bound, so that one of the two is wrong."""
    worst = max(rows, key=lambda row: row.speedup / row.bound)
    if worst.speedup > worst.bound * (1 + NOISE):
        raise RunError(
            f"{worst.phase} at batch {worst.batch}: the measured speed-up {worst.speedup:.2f} is above its bound "
            f"{worst.bound:.2f}; time again on a quiet machine"
        )


def _check_same_vocabulary(original: Any, submodel: Any) -> None:
    if original.vocab_size != submodel.vocab_size:
        raise InputError(
            f"the models have vocabularies of {original.vocab_size} and {submodel.vocab_size} tokens; name the model "
            "that the submodel came from"
        )


def _check_compiles(device: torch.device) -> None:
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # torch, its compiler, or the C++ compiler that one calls
        raise RunError(f"torch.compile does not work here: {first_line(error)}; time the models without it") from error


def _row(phase: str, ids: Tensor, calls: list[Ready], rounds: int) -> SpeedRow:
    with torch.no_grad():
        times = _interleaved(calls, rounds)
        with torch.compiler.set_stance("force_eager"):
            bound = work_of(calls[0]).ratio(work_of(calls[1]))
    per_call = DECODED if phase.startswith("decode") else 1
    milliseconds = [[second * 1e3 / per_call for second in seconds] for seconds in times]
    medians = [statistics.median(values) for values in milliseconds]
    highs = [statistics.quantiles(values, n=20, method="inclusive")[-1] for values in milliseconds]
    return SpeedRow(
        tokens=ids.shape[1],
        phase=phase,
        batch=ids.shape[0],
        original_ms=medians[0],
        original_p95_ms=highs[0],
        submodel_ms=medians[1],
        submodel_p95_ms=highs[1],
        speedup=medians[0] / medians[1],
        bound=bound,
    )


def _prefill(model: Any, ids: Tensor) -> Ready:
    return lambda: lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False).logits


def _compiled_prefill(model: Any, ids: Tensor) -> Ready:
    torch.compiler.reset()  # of one function only a few variants are compiled, and the others run eagerly
    call = torch.compile(_prefill(model, ids)(), dynamic=False)
    return lambda: call


def _decode(model: Any, ids: Tensor) -> Ready:
    """DECODED single tokens after a prompt that is in the cache already; every call has a copy of that cache."""
    return _decoding(model, ids, DynamicCache(config=model.config), model)


def _compiled_decode(model: Any, ids: Tensor) -> Ready:
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    return _decoding(model, ids, cache, torch.compile(model.__call__, dynamic=False))


def _decoding(model: Any, ids: Tensor, prompt: Cache, call: Callable[..., object]) -> Ready:
    with torch.no_grad():
        model(input_ids=ids[:, :-DECODED], use_cache=True, logits_to_keep=1, **{CACHE: prompt})
    steps = ids[:, -DECODED:].split(1, dim=1)

    def run(cache: Cache) -> None:
        for step in steps:
            call(input_ids=step, use_cache=True, logits_to_keep=1, **{CACHE: cache})

    return lambda: functools.partial(run, copy.deepcopy(prompt))


_COMPILED = {_prefill: _compiled_prefill, _decode: _compiled_decode}


def _interleaved(calls: list[Ready], rounds: int) -> list[list[float]]:
    """Seconds per call, the calls taking turns."""
    for ready in (*calls, *calls):
        _seconds(ready())
    times: list[list[float]] = [[] for _ in calls]
    with without_collection():
        while len(times[0]) < rounds or sum(map(sum, times)) < LEAST_SECONDS:
            for seconds, ready in zip(times, calls, strict=True):
                seconds.append(_seconds(ready()))
    return times


def _seconds(call: Call) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def work_of(ready: Ready) -> Work:
    """Counts what a call does, as it runs eagerly and with attention written out."""
    ready()()
    call = ready()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        call()
    call = ready()
    with _Traffic() as traffic:
        call()
    return Work(flops.get_total_flops(), traffic.bytes, traffic.operations)


class _Traffic(TorchDispatchMode):
    """Bytes of operands and results of operations that are no views, and the number of all: a view costs its call."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if not func.is_view:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside, and none left over from before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

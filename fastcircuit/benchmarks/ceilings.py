"""What this machine can do, measured: bytes per second of a stream, and operations per second of products.

Products are those of a square ``torch.mm``, or of our own chains of multiply-adds that never leave the registers
(``csrc/peak.h``), on as many threads: whichever is faster. A library may be far from what the processor can do (MKL on
AMD), and then its product is no ceiling; where it uses matrix tiles (AMX), the chains are none.
"""

import functools
import math
from dataclasses import dataclass

import torch

from fastcircuit.benchmarks.case import Work
from fastcircuit.benchmarks.timing import clock
from fastcircuit.ops import cpu, extension

SIDE = {"cpu": 1536, "cuda": 8192}
SECONDS = 0.25
ROUNDS = 2**16  # steps of every chain per call
SMALLEST, LARGEST = 2**16, {"cpu": 2**29, "cuda": 2**31}


@dataclass
class Ceilings:
    """The best rates seen so far on ``device``; measuring again can only raise them.

    A machine that others use is slow for seconds at a time, and a floor from a slow moment would be too high.
    """

    device: str

    def __post_init__(self) -> None:
        self._flops: dict[torch.dtype, float] = {}
        self._bytes: dict[int, float] = {}

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Of products in ``dtype``, or in float32 where that is faster."""
        if dtype not in self._flops:
            self._flops[dtype] = _product_rate(self.device, dtype)
        own = self._flops[dtype]
        return max(own, self.flops_per_second(torch.float32)) if dtype == torch.bfloat16 else own

    def bytes_per_second(self, working_set: int) -> float:
        """Of copying or of reading, whichever is faster, as many bytes as are given (rounded up to a power of two)."""
        size = min(max(2 ** math.ceil(math.log2(max(working_set, 1))), SMALLEST), LARGEST[self.device])
        if size not in self._bytes:
            self._bytes[size] = _stream_rate(self.device, size)
        return self._bytes[size]

    def floor(self, work: Work, dtype: torch.dtype) -> float:
        """Seconds below which no implementation can do ``work``."""
        return max(work.flops / self.flops_per_second(dtype), work.bytes / self.bytes_per_second(work.bytes))

    def measure_again(self, work: Work, dtype: torch.dtype) -> None:
        """Raise the ceilings that :meth:`floor` of this work rests on, where they were measured too low."""
        size = min(max(2 ** math.ceil(math.log2(max(work.bytes, 1))), SMALLEST), LARGEST[self.device])
        self._bytes[size] = max(self._bytes.get(size, 0.0), _stream_rate(self.device, size))
        for each in {dtype, torch.float32}:
            self._flops[each] = max(self._flops.get(each, 0.0), _product_rate(self.device, each))


@functools.cache
def ceilings(device: str, threads: int) -> Ceilings:
    """One set per process, device and number of threads."""
    return Ceilings(device)


def _product_rate(device: str, dtype: torch.dtype) -> float:
    return max(_matmul_rate(device, dtype), _register_rate(device, dtype))


def _register_rate(device: str, dtype: torch.dtype) -> float:
    """Of the widest instruction set this machine can run, whichever the kernels are told to use; 0 without any."""
    if device != "cpu" or extension.kernels is None or dtype not in cpu.CODES:
        return 0.0
    widest = extension.ISAS.index(extension.runnable_isas()[-1])
    run = functools.partial(extension.kernels.multiply_adds, widest, torch.get_num_threads(), cpu.CODES[dtype], ROUNDS)
    return run() / _best(device, run)


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(device, lambda: torch.mm(a, b, out=out))


def _stream_rate(device: str, size: int) -> float:
    """``size`` counts what is read and what is written."""
    source = torch.ones(size // 8, device=device)
    target = torch.empty_like(source)
    whole = torch.ones(size // 4, device=device)
    return size / min(_best(device, lambda: target.copy_(source)), _best(device, lambda: whole.sum()))


def _best(device: str, call) -> float:
    """Seconds of the fastest call in SECONDS."""
    timer = clock(device)
    first = timer.seconds(call)
    repeats = max(1, math.ceil(1e-4 / max(first, 1e-9)))
    count = max(5, min(1000, int(SECONDS / max(first * repeats, 1e-9))))
    return min(timer.seconds(call, repeats) for _ in range(count))

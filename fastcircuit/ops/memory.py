"""Running out of memory: which errors say so, what can be given back, and trying again."""

import errno
from collections.abc import Callable
from typing import TypeVar

import torch

from fastcircuit.ops.recycling import POOL

Result = TypeVar("Result")
# What an error that says so may be.
ERRORS = (RuntimeError, MemoryError, OSError)
_SIGNS = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_cached_memory(device: torch.device) -> None:
    """Give back memory that is only held for later."""
    POOL.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def with_less(call: Callable[[], Result], device: torch.device, ask_for_less: Callable[[], None]) -> Result:
    """What ``call`` returns, tried again as long as memory runs out.

    Args:
        ask_for_less: called before each new try; makes ``call`` need less, or raises.
    """
    while True:
        try:
            return call()
        except ERRORS as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory(device)  # here the error and what it kept alive are gone
        ask_for_less()

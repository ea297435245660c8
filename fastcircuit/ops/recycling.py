"""Memory for large CPU tensors that is used again once the tensor is gone.

The first touch of fresh pages can cost more than computing what goes into them: the system clears them one by one, and
takes them back on every free. From LEAST_BYTES on, the results of the C++ kernels, the stream and its gradient live in
mappings of our own, which go back to a pool when the last tensor that views them is freed. The pool keeps at most
MOST_BYTES. Huge pages are not asked for: rows a power of two apart would then meet in the same few cache sets
(measured: a third slower).
"""

import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

LEAST_BYTES = 4 * 2**20
MOST_BYTES = 2**30
_ROUND = 2 * 2**20


class Pool:
    """Mappings that no tensor uses."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Bytes held for later."""
        return sum(len(mapping) for mapping in self._free)

    def empty(self, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor of ``shape``, in the dtype and on the device of ``like``; contiguous."""
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < LEAST_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return like.new_empty(shape)
        mapping = self._take(size)
        lease = memoryview(mapping)
        weakref.finalize(lease, self._give_back, mapping).atexit = False
        flat = torch.frombuffer(lease, dtype=like.dtype, count=math.prod(shape))
        if torch.are_deterministic_algorithms_enabled():  # as torch does, so that what is left unwritten is found
            flat.fill_(torch.nan)
        return flat.view(shape)

    def clear(self) -> None:
        """Give everything back to the system."""
        with self._lock:
            self._free.clear()

    def _take(self, size: int) -> mmap.mmap:
        """The smallest free mapping that is large enough, and not twice as large; or a new one."""
        with self._lock:
            fitting = [mapping for mapping in self._free if size <= len(mapping) <= 2 * size]
            if fitting:
                best = min(fitting, key=len)
                self._free.remove(best)
                return best
        length = math.ceil(size / _ROUND) * _ROUND
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _give_back(self, mapping: mmap.mmap) -> None:
        with self._lock:
            self._free.append(mapping)
            while self.num_bytes > MOST_BYTES:
                self._free.pop(0)


POOL = Pool()

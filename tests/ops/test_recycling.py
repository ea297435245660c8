"""The pool that large CPU results come from."""

import mmap

import pytest
import torch

from fastcircuit.ops import masked_read
from fastcircuit.ops.recycling import LEAST_BYTES, MOST_BYTES, Pool

LIKE = torch.zeros(1)
NUMBERS = LEAST_BYTES // 4

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="there is no pool on this system")


def test_memory_is_used_again_when_the_last_view_is_gone():
    pool = Pool()
    result = pool.empty((2, NUMBERS), LIKE)
    address, view = result.data_ptr(), result[1]
    del result
    assert pool.num_bytes == 0
    other = pool.empty((2, NUMBERS), LIKE)
    assert other.data_ptr() != address
    view.fill_(3.0)
    del view
    assert pool.num_bytes >= 8 * NUMBERS
    assert pool.empty((NUMBERS, 2), LIKE).data_ptr() == address


def test_small_results_and_much_smaller_ones_come_from_elsewhere():
    pool = Pool()
    assert pool.empty((3, 0), LIKE).shape == (3, 0)
    del_me = pool.empty((9 * NUMBERS,), LIKE)
    del del_me
    held = pool.num_bytes
    small = pool.empty((NUMBERS,), LIKE)
    assert pool.num_bytes == held
    del small
    pool.clear()
    assert pool.num_bytes == 0


def test_the_pool_is_bounded():
    pool = Pool()
    results = [pool.empty((MOST_BYTES // 16,), LIKE) for _ in range(5)]
    results.clear()
    assert 0 < pool.num_bytes <= MOST_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_ordinary_tensors(dtype):
    stream, mask = torch.randn(3, 64, NUMBERS // 64, dtype=dtype), torch.rand(2, 3).to(dtype)
    reads = masked_read(stream, mask, backend="cpu")
    expected = masked_read(stream, mask, backend="reference")
    torch.testing.assert_close(reads, expected, rtol=1e-2, atol=1e-2)
    leaf = reads.requires_grad_()
    (leaf * 2).sum().backward()
    assert leaf.grad.eq(2).all()

"""How a tensor must lie in memory for the compiled backends."""

from torch import Tensor


def has_dense_rows(tensor: Tensor, written: bool = False) -> bool:
    """Whether each ``[T, d]`` of ``[W, T, d]`` is contiguous, and, if it is written, no two overlap."""
    writers, tokens, width = tensor.shape
    row, token, one = tensor.stride()
    dense = (one == 1 or width == 1) and (token == width or tokens == 1)
    apart = not written or row >= tokens * width or writers == 1
    return (dense and apart) or tensor.numel() == 0


def layout_reasons(op: str, tensors: tuple[Tensor | None, ...]) -> list[str]:
    """What keeps compiled kernels from reading the stream, or adding to its gradient, where they are."""
    stream = tensors[0 if op == "masked_read" else 1]
    reasons = []
    if stream is not None and not has_dense_rows(stream):
        reasons.append("the [T, d] of each stream row is not contiguous")
    if op == "masked_read_backward_" and tensors[3] is not None and not has_dense_rows(tensors[3], written=True):
        reasons.append("the [T, d] of each grad_stream row is not contiguous, or rows overlap")
    return reasons

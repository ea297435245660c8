"""What decides whether an op may be called directly, past torch's dispatcher and its microseconds."""

import torch
from torch import Tensor


def plain_eager(tensor: Tensor) -> bool:
    """Whether nothing watches a call on ``tensor``: no compiler, subclass, dispatch mode or function transform."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return any(t is not None and t.requires_grad for t in tensors)

"""Calls that between them launch every Triton configuration, on meta tensors: nothing is computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS, WIDTH, WRITERS = 2048, 768, 157

# One call of every op: what tests compile again.
MAIN = (
    "masked_read live bfloat16 37",
    "live_writers 157 wanted",
    "hard_concrete torch.float32",
    "answer_kl bfloat16",
    "read_norm bfloat16 37",
    "packed_attention bfloat16 64 skipping",
    "live_product GPT-2 small bfloat16",
)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(hip: bool) -> dict[str, Callable[[], Any]]:
    """By name; ``hip`` leaves out what AMD's backend of Triton does not have."""
    return {
        **_masked_reads(hip),
        **_live_writers(),
        **_hard_concrete(),
        **_answer_kl(hip),
        **_read_norm(hip),
        **_packed_attention(),
        **_live_product(hip),
    }


def _masked_reads(hip: bool) -> dict[str, Callable[[], Any]]:
    found = {}
    # Reader counts reach every tile: one, a layer of stories260K, of GPT-2 small, of a 13B Llama.
    for precision in _precisions(hip):
        for readers in (1, 24, 37, 121):
            found[f"masked_read {precision} {readers}"] = _masked_read(readers, torch.float32, precision)
    for readers in (1, 24, 37, 121):
        found[f"masked_read bfloat16 {readers}"] = _masked_read(readers, torch.bfloat16)
    found["masked_read bfloat16 mask 121"] = _masked_read(121, torch.bfloat16, mask_dtype=torch.bfloat16)
    for readers in (24, 37, 121):
        found[f"masked_read float16 {readers}"] = _masked_read(readers, torch.float16, grad_dtype=torch.float32)
        found[f"masked_read bfloat16 to float32 {readers}"] = _masked_read(
            readers, torch.bfloat16, grad_dtype=torch.float32
        )
    found["masked_read float64 1"] = _masked_read(1, torch.float64)
    # With 130, the backward is split: it takes 128 at once.
    for readers in (37, 121, 130):
        found[f"masked_read live bfloat16 {readers}"] = _masked_read(readers, torch.bfloat16, live=True)
    for precision in _precisions(hip):
        for readers in (37, 121):
            found[f"masked_read live {precision} {readers}"] = _masked_read(
                readers, torch.float32, precision, live=True
            )
    return found


def _masked_read(
    readers: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    mask_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    live: bool = False,
) -> Callable[[], Any]:
    from fastcircuit_kernels import masked_read as kernels

    if mask_dtype is None:
        mask_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stream, grad = (_meta(rows, TOKENS, WIDTH, dtype=dtype) for rows in (WRITERS, readers))
    grad_stream = _meta(WRITERS, TOKENS, WIDTH, dtype=grad_dtype or dtype)
    base, mask = stream[0], _meta(readers, WRITERS, dtype=mask_dtype)
    listed = _meta(WRITERS + 2 + readers, dtype=torch.int32) if live else None

    def call() -> None:
        kernels.masked_read(stream, mask, base, listed, precision)
        kernels.mask_gradient(grad, stream, mask, listed, precision)
        kernels.add_stream_gradient(grad, mask, grad_stream, True, listed, precision)
        kernels.both_gradients(grad, stream, mask, grad_stream, True, listed, precision)

    return call


def _live_writers() -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels.live_writers import live_writers

    wanted = _meta(37, dtype=torch.int32)
    return {
        "live_writers": lambda: live_writers(_meta(37, WRITERS), None),
        **{f"live_writers {w} wanted": lambda w=w: live_writers(_meta(37, w), wanted) for w in (WRITERS, 1640)},
    }


def _hard_concrete() -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels import hard_concrete as kernels

    def call(dtype: torch.dtype) -> None:
        log_alpha, seed = _meta(33093, dtype=dtype), _meta(2, dtype=torch.int64)
        kernels.hard_concrete(log_alpha, seed, 2 / 3, -0.1, 1.1, 1e-6, -1.6)
        kernels.hard_concrete_grad(log_alpha, log_alpha, log_alpha, log_alpha, 2 / 3, -0.1, 1.1)

    return {f"hard_concrete {dtype}": lambda d=dtype: call(d) for dtype in (torch.float32, torch.float64)}


def _answer_kl(hip: bool) -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels import answer_kl as kernels

    def call(dtype: torch.dtype, precision: str) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, weight, log_probs = (
            _meta(32, 768, dtype=dtype),
            _meta(50257, 768, dtype=dtype),
            _meta(32, 50257, dtype=wide),
        )
        _, stats = kernels.answer_kl(hidden, weight, log_probs, precision)
        kernels.answer_kl_grad(_meta(32, dtype=wide), hidden, weight, log_probs, stats, precision)

    found = {f"answer_kl {p}": lambda p=p: call(torch.float32, p) for p in _precisions(hip)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float64", torch.float64)):
        found[f"answer_kl {name}"] = lambda d=dtype: call(d, "ieee")
    return found


def _precisions(hip: bool) -> tuple[str, ...]:
    return ("ieee", "tf32") if hip else ("ieee", "tf32", "tf32x3")


def _read_norm(hip: bool) -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels import read_norm as kernels

    def call(readers: int, dtype: torch.dtype, precision: str, centered: bool, live: bool, fused: bool) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stream, mask = _meta(WRITERS, TOKENS, WIDTH, dtype=dtype), _meta(readers, WRITERS, dtype=wide)
        base, weight = stream[0], _meta(WIDTH, dtype=dtype)
        listed = _meta(WRITERS + 2 + readers, dtype=torch.int32) if live else None
        bias = weight if centered else None
        y, stats = kernels.read_norm(stream, mask, base, weight, bias, 1e-5, centered, 0, listed, precision, fused)
        kernels.read_norm_grad(y, stats, stream, mask, base, weight, centered, 0, listed, precision, fused)

    found = {
        f"read_norm {precision} {readers}": lambda r=readers, p=precision: call(r, torch.float32, p, True, False, True)
        for precision in _precisions(hip)
        for readers in (1, 37)
    }
    for readers in (1, 37, 121):
        found[f"read_norm bfloat16 {readers}"] = lambda r=readers: call(r, torch.bfloat16, "ieee", True, False, True)
    # A layer of GPT-2 small, of a 13B Llama.
    for readers, centered in ((37, True), (121, False)):
        found[f"read_norm bfloat16 live {readers}"] = lambda r=readers, c=centered: call(
            r, torch.bfloat16, "ieee", c, True, True
        )
        for precision in _precisions(hip):
            found[f"read_norm live {precision} {readers}"] = lambda r=readers, p=precision, c=centered: call(
                r, torch.float32, p, c, True, True
            )
    found["read_norm bfloat16 live rms"] = lambda: call(37, torch.bfloat16, "ieee", False, True, True)
    found["read_norm bfloat16 live apart"] = lambda: call(37, torch.bfloat16, "ieee", True, True, False)
    found["read_norm bfloat16 apart"] = lambda: call(37, torch.bfloat16, "ieee", True, False, False)
    found["read_norm bfloat16 rms"] = lambda: call(37, torch.bfloat16, "ieee", False, False, True)
    found["read_norm float16"] = lambda: call(37, torch.float16, "ieee", True, False, True)
    found["read_norm float64"] = lambda: call(1, torch.float64, "ieee", True, False, True)
    return found


def _packed_attention() -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels.packed_attention import Call

    def call(
        dtype: torch.dtype,
        width: int,
        longest: int = 64,
        skips: bool = False,
        rotary: bool = False,
        groups: int = 1,
        causal: bool = True,
        window: int | None = None,
    ) -> None:
        query, key = _meta(12, TOKENS, width, dtype=dtype), _meta(12 // groups, TOKENS, width, dtype=dtype)
        starts, alive = _meta(33, dtype=torch.int64), _meta(12, dtype=torch.int32) if skips else None
        tables = (_meta(TOKENS, width, dtype=dtype),) * 2 if rotary else None
        launched = Call(query, key, starts, longest, None, alive, tables, 0.125, causal, window, "ieee")
        out, lse = launched.forward(query, key, key)
        launched.backward(out, query, key, key, out, lse)

    half = torch.bfloat16
    return {
        "packed_attention bfloat16 64 skipping": lambda: call(half, 64, skips=True),
        "packed_attention bfloat16 128 rotary, skipping": lambda: call(half, 128, rotary=True, groups=3, skips=True),
        "packed_attention bfloat16 64 both ways": lambda: call(half, 64, causal=False, window=9),
        "packed_attention bfloat16 64, 16 tokens": lambda: call(half, 64, longest=16),
        "packed_attention float16": lambda: call(torch.float16, 64),
    }


def _live_product(hip: bool) -> dict[str, Callable[[], Any]]:
    from fastcircuit_kernels.live_product import live_product

    def call(
        groups: int, inner: int, columns: int, dtype: torch.dtype, precision: str, by_column: bool, tokens: int
    ) -> None:
        """Forward with a bias, then backward: the other layout of the weights, none."""
        x, out, alive = (
            _meta(groups, tokens, inner, dtype=dtype),
            _meta(groups, tokens, columns, dtype=dtype),
            _meta(groups, dtype=torch.int32),
        )
        weight, bias = _meta(groups, inner, columns, dtype=dtype), _meta(groups, 1, columns, dtype=dtype)
        if by_column:
            weight = _meta(groups, columns, inner, dtype=dtype).transpose(1, 2)
        live_product(out, x, weight, None if by_column else bias, alive, False, precision)
        live_product(x, out, weight.transpose(1, 2), None, alive, True, precision)

    def layer(heads: int, head: int, mlp: int, width: int, tokens: int, llama: bool, dtype: torch.dtype, p: str):
        """Its heads' projections and output projections, both products of its MLP; the last layer's has few tokens."""
        for groups, inner, columns in ((heads, width, head), (heads, head, width), (1, width, mlp), (1, mlp, width)):
            call(groups, inner, columns, dtype, p, llama, tokens)
        call(1, width, mlp, dtype, p, llama, 32)

    small, large = (12, 64, 3072, WIDTH, TOKENS, False), (40, 128, 13824, 5120, 256, True)
    found = {}
    for name, shape in (("GPT-2 small", small), ("Llama 13B", large)):
        for dtype in (torch.bfloat16, torch.float16):
            found[f"live_product {name} {str(dtype)[6:]}"] = lambda s=shape, d=dtype: layer(*s, d, "ieee")
        for precision in _precisions(hip):
            found[f"live_product {name} {precision}"] = lambda s=shape, p=precision: layer(*s, torch.float32, p)
    found["live_product float64"] = lambda: call(2, 24, 32, torch.float64, "ieee", False, 20)
    return found

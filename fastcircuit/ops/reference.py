"""The operations in plain torch: the specification every other backend is tested against."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcircuit.ops.mlp import Affine


def missing_reason() -> str | None:
    """Why this backend cannot be used at all: never, it is plain torch."""
    return None


def unsupported(op: str, *tensors: Tensor | None) -> list[str]:
    """Why this backend cannot take these tensors: it takes everything the op accepts."""
    return []


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 for the half precisions, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def masked_read(stream: Tensor, mask: Tensor, base: Tensor | None, live: Tensor | None = None) -> Tensor:
    """``base + sum_j mask[r, j] * stream[j]``, rounded once to the dtype of ``stream``."""
    wide = accumulation_dtype(stream.dtype)
    reads = mask.to(wide) @ _live_rows(stream, live).flatten(1).to(wide)
    reads = reads.unflatten(1, stream.shape[1:])
    if base is not None:
        reads = reads + base.to(wide)
    return only_wanted(reads.to(stream.dtype), live)


def masked_read_backward_(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    grad_stream: Tensor | None,
    needs_mask_grad: bool,
    live: Tensor | None = None,
) -> Tensor | None:
    """Add ``mask^T grad_reads`` to ``grad_stream`` and return ``<grad_reads[r], stream[w]>``."""
    wide = accumulation_dtype(stream.dtype)
    grad, mask = only_wanted(grad_reads, live).flatten(1).to(wide), only_wanted(mask, live)
    if grad_stream is not None:
        update = (mask.to(wide).T @ grad).unflatten(1, stream.shape[1:])
        grad_stream.copy_(grad_stream.to(wide) + update)
    if not needs_mask_grad:
        return None
    grad_mask = (grad @ _live_rows(stream, live).flatten(1).to(wide).T).to(mask.dtype)
    return grad_mask if live is None else torch.where((mask > 0) & (mask < 1), grad_mask, 0)


def masked_read_grads(
    grad_reads: Tensor,
    stream: Tensor,
    mask: Tensor,
    needs_stream: bool,
    needs_mask: bool,
    live: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``masked_read`` as new tensors; None for one that is not needed."""
    grad_stream = torch.zeros_like(stream, memory_format=torch.contiguous_format) if needs_stream else None
    grad_mask = masked_read_backward_(grad_reads, stream, mask, grad_stream, needs_mask, live)
    return grad_stream, grad_mask


def live_writers(mask: Tensor, wanted: Tensor | None = None) -> Tensor:
    """How many writers are open and live, the rows of the open, other live and dead ones; then 1 per wanted reader."""
    flags = torch.ones(len(mask), dtype=torch.bool, device=mask.device) if wanted is None else wanted != 0
    mask = torch.where(flags[:, None], mask, 0)
    is_open, is_live = ((mask > 0) & (mask < 1)).any(0), (mask != 0).any(0)
    order = torch.argsort(2 - is_open.int() - is_live.int(), stable=True)
    return torch.cat([is_open.sum()[None], is_live.sum()[None], order, flags]).int()


def _live_rows(stream: Tensor, live: Tensor | None) -> Tensor:
    """``stream`` with zeros for the rows that are not live, whatever they hold."""
    if live is None:
        return stream
    is_live = torch.arange(len(stream), device=live.device) < live[1]
    is_live = torch.empty_like(is_live).index_copy_(0, live[2 : 2 + len(stream)].long(), is_live)
    return torch.where(is_live[:, None, None], stream, 0)


def only_wanted(of_readers: Tensor, live: Tensor | None) -> Tensor:
    """``of_readers`` ``[R, ...]`` with zeros for the readers that a live list leaves out, whatever they hold."""
    if live is None:
        return of_readers
    flags = live[len(live) - len(of_readers) :].view(-1, *(1,) * (of_readers.dim() - 1))
    return torch.where(flags != 0, of_readers, 0)


def live_product_(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor, zeros: bool) -> None:
    """``x[g] @ weight[g] + bias[g]`` where ``alive[g]`` is not 0, rounded once; elsewhere 0 with ``zeros``."""
    wide = accumulation_dtype(x.dtype)
    product = torch.bmm(x.to(wide), weight.to(wide))
    if bias is not None:
        product = product + bias.to(wide)
    out.copy_(torch.where(alive[:, None, None] != 0, product.to(out.dtype), 0 if zeros else out))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)``, rounded to the dtype of ``x``, times ``weight``."""
    return (_normalised(x, eps)[0].to(x.dtype) * weight).contiguous()


def rms_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``rms_norm`` as new tensors, each rounded once; None for one that is not needed."""
    normed, rstd = _normalised(x, eps)
    grad = grad.to(normed.dtype)
    grad_x = grad_weight = None
    if needs_x:
        grad_normed = grad * weight
        along_x = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (rstd * (grad_normed - normed * along_x)).to(x.dtype).contiguous()
    if needs_weight:
        grad_weight = (grad * normed.to(x.dtype)).sum_to_size(weight.shape).to(x.dtype)
    return grad_x, grad_weight


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x * rstd`` and ``rstd = 1 / sqrt(mean(x^2) + eps)``, in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, rounded once."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps).contiguous()


def norm_backward_(grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool) -> None:
    """Overwrite ``grad`` with the gradient of ``x``, rounded once."""
    wide = x.to(accumulation_dtype(x.dtype))
    g = grad.to(wide.dtype) * weight
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
        g = g - g.mean(-1, keepdim=True)
    normed, rstd = _normalised(wide, eps)
    grad.copy_(rstd * (g - normed * (g * normed).mean(-1, keepdim=True)))


def norm_projection(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    centered: bool,
) -> Tensor:
    """The norm, then a matrix for each head."""
    normed = layer_norm(x, norm_weight, norm_bias, eps) if centered else rms_norm(x, norm_weight, eps)
    return torch.bmm(normed, weight) if bias is None else torch.baddbmm(bias, normed, weight)


def norm_projection_grad_(
    grad: Tensor, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, grad_x: Tensor, centered: bool
) -> None:
    """Overwrite ``grad_x`` with the gradient of ``x``."""
    torch.bmm(grad, weight.transpose(1, 2), out=grad_x)
    norm_backward_(grad_x, x, norm_weight, eps, centered)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def mlp(
    x: Tensor, gate: Affine | None, up: Affine, down: Affine, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The products as torch makes them; the derivatives of the hidden numbers from its activations' own."""
    act = _ACTIVATIONS[activation]
    activated = _affine(x, gate or up)
    hidden = act(activated) if gate is None else act(activated) * _affine(x, up)
    if not keep:
        return _affine(hidden, down), None
    with torch.enable_grad():
        leaf = activated.detach().requires_grad_()
        (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
    slopes = [slope] if gate is None else [slope * _affine(x, up), act(activated)]
    return _affine(hidden, down), torch.stack(slopes)


def mlp_grad(grad: Tensor, slopes: Tensor, gate: Affine | None, up: Affine, down: Affine) -> Tensor:
    """The gradient of the input."""
    of_products = (grad @ down.weight.T) * slopes
    parts = [up] if gate is None else [gate, up]
    return torch.stack([part @ into.weight.T for part, into in zip(of_products, parts, strict=True)]).sum(0)


def _affine(x: Tensor, affine: Affine) -> Tensor:
    return x @ affine.weight if affine.bias is None else torch.addmm(affine.bias, x, affine.weight)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    kv_of_head: Tensor | None,
    alive: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, None]:
    """Softmax attention, one sequence after the other, written out."""
    query, key, value = _of_heads(query, key, value, kv_of_head, alive, cos, sin)
    out = [
        _attention(query[:, first:last], key[:, first:last], value[:, first:last], scale, causal, window)
        for first, last in itertools.pairwise(starts.tolist())
    ]
    return torch.cat(out, dim=1).transpose(0, 1).flatten(1), None


def packed_attention_grads(
    grad: Tensor,
    out: None,
    lse: None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    kv_of_head: Tensor | None,
    alive: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each step of the forward pass undone."""
    q, k, v = _of_heads(query, key, value, kv_of_head, alive, cos, sin)
    g = grad.unflatten(1, (len(query), query.shape[2])).transpose(0, 1)
    parts = [
        _attention_grads(g[:, first:last], q[:, first:last], k[:, first:last], v[:, first:last], scale, causal, window)
        for first, last in itertools.pairwise(starts.tolist())
    ]
    of_query, of_key, of_value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    if alive is not None:
        of_query, of_key, of_value = (_where_alive(part, alive) for part in (of_query, of_key, of_value))
    kv_of_head = _kv_of_head(kv_of_head, query, key)
    of_key, of_value = (key.new_zeros(key.shape).index_add_(0, kv_of_head, part) for part in (of_key, of_value))
    if cos is not None and sin is not None:
        of_query, of_key = (_rotate_back(part, cos, sin).to(query.dtype) for part in (of_query, of_key))
    return of_query, of_key, of_value


def _of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_of_head: Tensor | None,
    alive: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated query, rotated key and value of every head, ``[H, T, d_head]`` each; 0 for heads to leave out."""
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    kv_of_head = _kv_of_head(kv_of_head, query, key)
    key, value = key.index_select(0, kv_of_head), value.index_select(0, kv_of_head)
    if alive is None:
        return query, key, value
    return _where_alive(query, alive), _where_alive(key, alive), _where_alive(value, alive)


def _kv_of_head(given: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The key and value head of every head, ``[H]``."""
    return torch.arange(len(query), device=key.device) * len(key) // max(len(query), 1) if given is None else given


def _where_alive(of_heads: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive[:, None, None] != 0, of_heads, 0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout, ``[H, T, d_head]``; the tables ``[T, d_rotary]`` may cover a part."""
    width = cos.shape[-1]
    part, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    first, second = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what was rotated."""
    part, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    first, second = (part * sin).chunk(2, dim=-1)
    return torch.cat((part * cos + torch.cat((second, -first), dim=-1), rest), dim=-1)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    weights, _ = _attention_weights(query, key, scale, causal, window)
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def _attention_grads(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    weights, hidden = _attention_weights(query, key, scale, causal, window)
    dtype = query.dtype
    grad, query, key, value = (part.to(weights.dtype) for part in (grad, query, key, value))
    of_weights = grad @ value.transpose(1, 2)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).masked_fill(hidden, 0) * scale
    grads = of_scores @ key, of_scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ grad
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def _attention_weights(
    query: Tensor, key: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The weights in the accumulation dtype, and which of them are hidden and 0."""
    wide = accumulation_dtype(query.dtype)
    scores = query.to(wide) @ key.to(wide).transpose(1, 2) * scale
    place = torch.arange(query.shape[1], device=query.device)
    distance = place[:, None] - place[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance.abs() >= window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1), hidden


def hard_concrete(
    log_alpha: Tensor, seed: Tensor, temperature: float, low: float, high: float, epsilon: float, zero_level: float
) -> tuple[Tensor, Tensor]:
    """Samples, and the probability that each is not 0; u and 1 - u are both kept, as the difference loses precision."""
    index = torch.arange(log_alpha.numel(), device=log_alpha.device)
    counter = (index, seed[1].expand_as(index), (seed[1] >> 32).expand_as(index), torch.zeros_like(index))
    step = (philox(seed[0], counter)[0] >> 9).to(log_alpha.dtype) + 0.5
    scale = (1 - 2 * epsilon) / 2**23
    logit = torch.log(epsilon + scale * step) - torch.log(epsilon + scale * (2**23 - step))
    concrete = torch.sigmoid((logit + log_alpha) / temperature)
    return torch.clamp(concrete * (high - low) + low, 0, 1), torch.sigmoid(log_alpha - zero_level)


def hard_concrete_grad(
    grad_z: Tensor, grad_on: Tensor, z: Tensor, on: Tensor, temperature: float, low: float, high: float
) -> Tensor:
    """The gradient of ``log_alpha``: of a sample through the sigmoid that its value is a stretch of."""
    concrete = (z - low) / (high - low)
    slope = (high - low) * concrete * (1 - concrete) / temperature
    return grad_z * torch.where((z > 0) & (z < 1), slope, 0) + grad_on * on * (1 - on)


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., 2011): four random 32-bit words per counter, all of them in int64."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (word & mask for word in counter)
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        first, third = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps around, which leaves all 64 bits in place
        c0, c1, c2, c3 = (third >> 32) & mask ^ c1 ^ k0, third & mask, (first >> 32) & mask ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def answer_kl(hidden: Tensor, weight: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_v p_v (ln p_v - ln q_v)`` per row; and ``ln sum exp(logit)`` and ``sum p``, which backward needs."""
    logits = hidden.to(reference.dtype) @ weight.to(reference.dtype).T
    probs, log_q = reference.exp(), logits.log_softmax(-1)
    kl = torch.where(probs > 0, probs * (reference - log_q), 0).sum(-1)
    return kl, torch.stack([logits.logsumexp(-1), probs.sum(-1)])


def answer_kl_grad(grad: Tensor, hidden: Tensor, weight: Tensor, reference: Tensor, stats: Tensor) -> Tensor:
    """The gradient of ``hidden``: ``sum_v (q_v sum p - p_v) weight_v``, times that of the divergence."""
    logits = hidden.to(reference.dtype) @ weight.to(reference.dtype).T
    log_sum, mass = stats[:, :, None]
    of_logits = grad[:, None] * (mass * (logits - log_sum).exp() - reference.exp())
    return (of_logits @ weight.to(reference.dtype)).to(hidden.dtype)


def read_norm(
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``norm(masked_read(...))``, the means (0 for RMSNorm) and ``1 / deviation``; the last ``plain`` reads as read."""
    reads = masked_read(stream, mask, base, live)
    normed = len(mask) - plain
    y = layer_norm(reads[:normed], weight, bias, eps) if centered else rms_norm(reads[:normed], weight, eps)
    wide = reads.to(accumulation_dtype(reads.dtype))
    mean = wide.mean(-1) if centered else wide.new_zeros(wide.shape[:-1])
    rstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)
    mean[normed:], rstd[normed:] = 0, 1
    return torch.cat([y, reads[normed:]]), torch.stack([mean, rstd])


def read_norm_grad(
    grad: Tensor,
    stats: Tensor,
    stream: Tensor,
    mask: Tensor,
    base: Tensor | None,
    weight: Tensor,
    centered: bool,
    plain: int = 0,
    live: Tensor | None = None,
) -> Tensor:
    """The gradient of the reads, from that of their norm."""
    mean, rstd = stats[..., None]
    normed = (masked_read(stream, mask, base, live).to(stats.dtype) - mean) * rstd
    g = grad.to(stats.dtype) * weight
    along_x = (g * normed).mean(-1, keepdim=True)
    if centered:
        g = g - g.mean(-1, keepdim=True)
    grad_reads = (rstd * (g - normed * along_x)).to(grad.dtype).contiguous()
    grad_reads[len(mask) - plain :] = grad[len(mask) - plain :]
    return grad_reads

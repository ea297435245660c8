"""Packed tokens: everything token-wise runs on the real tokens only.

Real tokens are packed row after row into one ``[T]`` axis. Where no kernel attends within the rows as they lie there,
they are laid out again as ``[B, S]`` with the padding on the right, whichever side it came in on, so that the causal
mask alone keeps real queries off padding.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcircuit.errors import InputError

# Up to this length the packed kernel is at least as fast as torch's attention over padded sequences: the C++ one, that
# is; Triton's is taken at the same lengths, unmeasured.
SHORT = 256


class Packing:
    """Which positions of a ``[B, S]`` batch hold real tokens.

    Args:
        attention_mask: ``[B, S]``, nonzero at real tokens; None: every token is real. A row's real tokens must be
            contiguous (padding on the left or on the right), and every row needs one.
    """

    def __init__(self, shape: torch.Size, attention_mask: Tensor | None, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        real = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
        if real is not None:
            _check_mask(real, shape)
            if bool(real.all()):
                real = None
        self.real = real

    @property
    def is_full(self) -> bool:
        """Whether there is no padding at all."""
        return self.real is None

    @cached_property
    def lengths(self) -> Tensor:
        """Real tokens of every row, ``[B]``."""
        if self.real is None:
            return torch.full((self.shape[0],), self.shape[1], device=self.device)
        return self.real.sum(1)

    @cached_property
    def num_tokens(self) -> int:
        """T: real tokens in the batch."""
        return self.shape.numel() if self.real is None else int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        return self.shape[1] if self.real is None else int(self.lengths.max())

    @property
    def is_short(self) -> bool:
        """Whether the packed attention kernel is the faster one."""
        return self.longest <= SHORT

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of every row, then T, on the CPU: ``[B + 1]``."""
        return torch.nn.functional.pad(self.lengths.cpu().cumsum(0), (1, 0))

    @cached_property
    def token_index(self) -> Tensor:
        """Index into the flattened batch of every real token, ``[T]``."""
        if self.real is None:
            return torch.arange(self.num_tokens, device=self.device)
        return self.real.flatten().nonzero().squeeze(1)

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of every real token in its own row, counted from its first real token, ``[T]``."""
        if self.real is None:
            return torch.arange(self.shape[1], device=self.device).repeat(self.shape[0])
        return (self.real.cumsum(1) - 1).flatten()[self.token_index]

    @cached_property
    def _pad_index(self) -> Tensor:
        """Packed token for every place of the right-padded ``[B, longest]`` layout (padding: some real token)."""
        starts = self.lengths.cumsum(0) - self.lengths
        places = starts[:, None] + torch.arange(self.longest, device=self.device)
        return places.clamp_(max=self.num_tokens - 1).flatten()

    @cached_property
    def _unpad_index(self) -> Tensor:
        """Place in the flattened ``[B, longest]`` layout of every packed token, ``[T]``."""
        rows = torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), self.lengths)
        return rows * self.longest + self.position_ids

    def repeated(self, copies: int) -> "Packing":
        """``copies`` of the batch under each other: ``copies * T`` tokens, the first copy's first."""
        shape = torch.Size((copies * self.shape[0], self.shape[1]))
        return Packing(shape, None if self.real is None else self.real.repeat(copies, 1), self.device)

    def pack(self, batch: Tensor) -> Tensor:
        """``[B, S] -> [T]``."""
        return batch.flatten() if self.real is None else batch.flatten()[self.token_index]

    def to_sequences(self, heads: Tensor) -> Tensor:
        """``[H, T, d_head] -> [B, H, longest, d_head]``."""
        if not self.is_full:
            heads = heads.index_select(1, self._pad_index)
        return heads.unflatten(1, (self.shape[0], self.longest)).transpose(0, 1)

    def to_tokens(self, sequences: Tensor) -> Tensor:
        """``[B, H, longest, d_head] -> [T, H * d_head]``."""
        tokens = sequences.transpose(1, 2).flatten(2).flatten(0, 1)
        return tokens if self.is_full else tokens.index_select(0, self._unpad_index)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None
    ) -> Tensor:
        """Attention within each row: ``[H, T, d_head]`` (keys, values ``[KV, T, d_head]``) to ``[T, H * d_head]``."""
        mask = self._attention_mask(causal, window)
        out = F.scaled_dot_product_attention(
            self.to_sequences(query),
            self.to_sequences(key),
            self.to_sequences(value),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=key.shape[0] != query.shape[0],
        )
        return self.to_tokens(out)

    def _attention_mask(self, causal: bool, window: int | None) -> Tensor | None:
        """What causality alone does not hide: keys beyond the window, and padding when attention is not causal."""
        places = torch.arange(self.longest, device=self.device)
        if window is not None and window < self.longest:
            distance = places[:, None] - places[None, :]
            return (distance >= 0) & (distance < window) if causal else self._padding_mask() & (distance.abs() < window)
        if causal:
            return None
        return None if self.is_full else self._padding_mask()

    def _padding_mask(self) -> Tensor:
        """True at real keys, ``[B, 1, 1, longest]``."""
        return (torch.arange(self.longest, device=self.device) < self.lengths[:, None])[:, None, None]

    def select(self, positions: Tensor | None) -> Tensor:
        """Packed tokens at ``positions``.

        Args:
            positions: bool ``[B, S]``; or int ``[B]`` or ``[B, P]``, places in the padded rows (negative ones count
                from the end of the padded row); None: every real token.

        Returns:
            Indices into the packed axis, ``[N]``: row by row, in the order given.
        """
        batch, length = self.shape
        if positions is None:
            return torch.arange(self.num_tokens, device=self.device)
        positions = positions.to(self.device)
        if positions.dtype == torch.bool:
            if positions.shape != self.shape:
                raise InputError(
                    f"positions is a mask of shape {tuple(positions.shape)}; the batch is {tuple(self.shape)}"
                )
            flat = positions.flatten().nonzero().squeeze(1)
        else:
            if positions.dim() not in (1, 2) or positions.shape[0] != batch:
                raise InputError(f"positions has shape {tuple(positions.shape)}; accepted: [{batch}] or [{batch}, P]")
            places = positions.reshape(batch, -1)
            if places.numel() and not (-length <= int(places.min()) and int(places.max()) < length):
                raise InputError(f"positions must lie in [-{length}, {length - 1}], the rows have {length} places")
            flat = (torch.arange(batch, device=self.device)[:, None] * length + places % length).flatten()
        if self.real is None:
            return flat
        if not bool(self.real.flatten()[flat].all()):
            raise InputError("positions names padding; ask only for real tokens (attention_mask is 1 there)")
        packed = torch.full((batch * length,), -1, device=self.device)
        packed[self.token_index] = torch.arange(self.num_tokens, device=self.device)
        return packed[flat]


class FixedPacking(Packing):
    """A packing whose sizes are fixed and whose contents are buffers: refilled, it is another batch of the same shape.

    Nothing in it asks the device for a number. Rows may be empty and tokens may belong to no row (see
    :class:`fastcircuit.discovery.buckets.Bucket`).

    Args:
        longest: places of every row of the padded layout, ``S``.
        position_ids: position of every packed token in its row, ``[T]``.
        pad_index: packed token for every place of the padded layout, ``[B * S]``.
        unpad_index: place in the flattened padded layout of every packed token, ``[T]``.
        lengths: tokens of every row (at least 1, so that no softmax is empty), ``[B]``.
        full: every place of the padded layout is a token, in order.
    """

    def __init__(
        self, longest: int, position_ids: Tensor, pad_index: Tensor, unpad_index: Tensor, lengths: Tensor, full: bool
    ) -> None:
        self.shape, self.device = torch.Size((len(lengths), longest)), position_ids.device
        self.num_tokens, self.longest = len(position_ids), longest
        self.position_ids, self.lengths = position_ids, lengths
        self._pad_index, self._unpad_index = pad_index, unpad_index
        self._full = full

    @property
    def is_full(self) -> bool:
        return self._full

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of every row, on the device; the tokens too many are cut into more rows, none too long."""
        ends = self.lengths.cumsum(0)
        more = torch.arange(1, -(-self.num_tokens // self.longest) + 1, device=self.device) * self.longest
        return F.pad(torch.cat([ends, ends[-1] + more]).clamp_(max=self.num_tokens), (1, 0))


def _check_mask(real: Tensor, shape: torch.Size) -> None:
    if real.shape != shape:
        raise InputError(f"attention_mask has shape {tuple(real.shape)}; input_ids has {tuple(shape)}")
    if not bool(real.any(1).all()):
        raise InputError(f"row {int((~real.any(1)).nonzero()[0])} of attention_mask has no real token")
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise InputError("a row of attention_mask has a hole; real tokens must be contiguous, padding left or right")

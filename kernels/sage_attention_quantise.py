"""How SageAttention makes Q, K and V small: smoothing, then symmetric rounding in groups.

Q has one scale a row, K one a block of keys, V one a channel. The papers (SageAttention, Zhang et
al. 2024; SageAttention2, 2024) tie groups to the registers of one thread, a layout that Triton
does not offer; a scale per row costs nothing there and its error lies between their per-warp and
per-thread groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.attention_inputs import LOG2_E, key_bias, repeat_heads, softmax_scale

QUERY_BLOCK = 128
"""Queries that share one mean when Q is smoothed."""
E4M3_MAX = 448.0
_TINY = 1e-20


@dataclass(frozen=True)
class Smoothing:
    """What is centred before rounding; each leaves exact arithmetic unchanged.

    K minus its mean over the keys moves every score of a query alike, which softmax cancels; Q
    minus a block's mean is given back through `Quantised.bias`; V's mean through
    `Quantised.value_mean`.
    """

    query: bool = False
    key: bool = True
    value: bool = False


SMOOTH_KEY, SMOOTH_BOTH = Smoothing(), Smoothing(query=True)


@dataclass(frozen=True)
class Quantised:
    """Integers, their scales and what smoothing took out.

    `query` (batch, heads, queries, head_dim) and `key` (batch, key_heads, keys, head_dim) are int8;
    `query_scale` (batch, heads, queries) holds softmax scale · log₂e too; `key_scale` is (batch,
    key_heads, key blocks). `value` is of the input's type, or e4m3 with `value_scale` (batch,
    key_heads, head_dim). `bias` (batch, heads or 1, query blocks or 1, keys) adds to base-2 scores.
    """

    query: Tensor
    query_scale: Tensor
    key: Tensor
    key_scale: Tensor
    value: Tensor
    value_scale: Tensor | None
    value_mean: Tensor | None
    bias: Tensor | None
    key_block: int


def quantise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    smoothing: Smoothing = SMOOTH_KEY,
    bits: int = 8,
    value_range: float | None = None,
    key_block: int = 64,
) -> Quantised:
    """Smooth and round; `value_range` is the largest e4m3 magnitude of V, None keeps V as it is.

    Masked keys count neither for means nor for scales.
    """
    bias = key_bias(attn_mask, key)
    valid = None if bias is None else (bias > -torch.inf)[:, None, :, None]
    key_32 = key.to(torch.float32)
    if smoothing.key:
        key_32 = key_32 - mean_over_keys(key, valid)
    query_32 = query.to(torch.float32) * (softmax_scale(query, scale) * LOG2_E)
    bias = None if bias is None else bias[:, None, None] * LOG2_E
    if smoothing.query:
        means, correction = query_means(query_32, key_32)
        query_32 = query_32 - per_query(means, query.shape[2])
        bias = correction if bias is None else correction + bias
    key_8, key_scale = round_blocks(_zero_unless(valid, key_32), bits, key_block)
    query_8, query_scale = round_rows(query_32, bits)
    value_mean = mean_over_keys(value, valid) if smoothing.value else None
    value_scale = None
    if value_mean is not None:
        value = (value.to(torch.float32) - value_mean).to(value.dtype)
    if value_range is not None:
        value, value_scale = round_channels(_zero_unless(valid, value), value_range)
    mean = None if value_mean is None else value_mean[:, :, 0]
    return Quantised(
        query_8, query_scale, key_8, key_scale, value, value_scale, mean, bias, key_block
    )


def mean_over_keys(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over valid tokens in fp32, (batch, heads, 1, head_dim)."""
    if valid is None:
        return tensor.mean(dim=2, keepdim=True, dtype=torch.float32)
    total = torch.where(valid, tensor, 0).sum(dim=2, keepdim=True, dtype=torch.float32)
    return total / valid.sum(dim=2, keepdim=True).clamp_min(1)


def query_means(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Means of blocks of Q, and their scores with every key, (batch, heads, query blocks, keys)."""
    means = block_means(query, QUERY_BLOCK)
    return means, means @ repeat_heads(key, query.shape[1]).mT


def per_query(blocks: Tensor, queries: int) -> Tensor:
    """(batch, heads, query blocks, …) repeated for every query of a block."""
    return blocks.repeat_interleave(QUERY_BLOCK, dim=2)[:, :, :queries]


def block_means(tensor: Tensor, block: int) -> Tensor:
    """Mean of every `block` tokens, the last block of what is left: (batch, heads, blocks, dim)."""
    tokens = tensor.shape[2]
    counts = torch.full((-(-tokens // block),), block, device=tensor.device)
    counts[-1] -= counts.numel() * block - tokens
    return in_blocks(tensor, block).sum(dim=3) / counts[:, None]


def in_blocks(tensor: Tensor, block: int) -> Tensor:
    """(batch, heads, tokens, dim) as (batch, heads, blocks, block, dim), the last filled with 0."""
    padding = -tensor.shape[2] % block
    if padding:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
    return tensor.unflatten(2, (-1, block))  # type: ignore[no-any-return]


def round_rows(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and one scale for every row, (batch, heads, tokens)."""
    largest = 2 ** (bits - 1) - 1
    scale = (tensor.abs().amax(dim=-1) / largest).clamp_min(_TINY)
    return _rounded(tensor / scale[..., None], largest), scale


def round_blocks(tensor: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Integers and one scale for every `block` tokens, (batch, heads, blocks)."""
    largest = 2 ** (bits - 1) - 1
    blocks = in_blocks(tensor, block)
    scale = (blocks.abs().amax(dim=(3, 4)) / largest).clamp_min(_TINY)
    rounded = _rounded(blocks / scale[..., None, None], largest)
    return rounded.flatten(2, 3)[:, :, : tensor.shape[2]], scale


def round_channels(value: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """e4m3 values with magnitudes up to `largest` and one scale a channel, (batch, heads, dim)."""
    value = value.to(torch.float32)
    scale = (value.abs().amax(dim=2) / largest).clamp_min(_TINY)
    return (value / scale[:, :, None]).to(torch.float8_e4m3fn), scale


def _rounded(tensor: Tensor, largest: int) -> Tensor:
    """Half up, as the Triton kernels round."""
    return torch.floor(tensor + 0.5).clamp(-largest, largest).to(torch.int8)


def _zero_unless(valid: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if valid is None else torch.where(valid, tensor, 0)

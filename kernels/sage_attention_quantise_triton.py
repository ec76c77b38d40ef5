# ruff: noqa: N803 -- Triton's compile-time arguments are capitals
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""SageAttention's rounding in Triton: one pass that smooths, scales, rounds and lays out.

Makes the same `Quantised` as sage_attention_quantise.quantise, padded as the kernel loads it: K and
V to whole key blocks, the head dimension to a power of two, e4m3 V with tokens contiguous (the
order that Hopper's fp8 instruction needs).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.attention_inputs import LOG2_E, key_bias, softmax_scale
from accel.kernels.attention_softmax_triton import dense_last_axis, padded_dim, strides, to_e4m3
from accel.kernels.sage_attention_quantise import (
    QUERY_BLOCK,
    SMOOTH_KEY,
    Quantised,
    Smoothing,
    mean_over_keys,
    query_means,
)

_TINY = 1e-20


@triton.jit
def round_int8(
    source,
    mean,
    bias,
    rounded,
    scales,
    source_batch,
    source_head,
    source_token,
    mean_row,
    mean_block,
    bias_batch,
    heads,
    tokens,
    padded,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (blocks, batch · heads): (source · factor − mean) to int8 by row or by block.

    `mean` is (batch · heads, blocks or 1, head_dim). Tokens with a `bias` of −inf become 0.
    """
    block, row_head = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    batch, head = row_head // heads, row_head % heads
    rows, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    wide = dims < HEAD_DIM
    inside = rows < tokens
    at = source + batch * source_batch + head * source_head
    at += tl.cast(rows, tl.int64)[:, None] * source_token + dims[None, :]
    block_values = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0)
    values = block_values.to(tl.float32) * factor
    if HAS_MEAN:
        center = tl.load(mean + row_head * mean_row + block * mean_block + dims, wide, other=0.0)
        values = values - center[None, :]
    if HAS_BIAS:
        inside = inside & (tl.load(bias + batch * bias_batch + rows, inside, 0.0) > -float("inf"))
    values = tl.where(inside[:, None], values, 0.0)
    largest = tl.max(tl.abs(values), 1)
    if PER_ROW:
        scale = tl.maximum(largest / 127.0, 1e-20)
        tl.store(scales + row_head * tokens + rows, scale, mask=rows < tokens)
        values = values / scale[:, None]
    else:
        scale = tl.maximum(tl.max(largest, 0) / 127.0, 1e-20)
        tl.store(scales + row_head * tl.num_programs(0) + block, scale)
        values = values / scale
    values = tl.minimum(tl.maximum(tl.floor(values + 0.5), -127.0), 127.0)
    target = rounded + row_head * padded * BLOCK_D
    target += tl.cast(rows, tl.int64)[:, None] * BLOCK_D + dims[None, :]
    tl.store(target, values.to(tl.int8), mask=(rows < padded)[:, None])


@triton.jit
def round_e4m3_transposed(
    source,
    mean,
    bias,
    scales,
    rounded,
    source_batch,
    source_head,
    source_token,
    bias_batch,
    heads,
    tokens,
    padded,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (blocks, batch · heads): (source − mean) / channel scale, as (head_dim, tokens)."""
    block, row_head = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    batch, head = row_head // heads, row_head % heads
    rows, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    wide = dims < HEAD_DIM
    inside = rows < tokens
    at = source + batch * source_batch + head * source_head
    at += tl.cast(rows, tl.int64)[:, None] * source_token + dims[None, :]
    block_values = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0)
    values = block_values.to(tl.float32)
    if HAS_MEAN:
        center = tl.load(mean + row_head * HEAD_DIM + dims, wide, other=0.0)
        values = values - center[None, :]
    if HAS_BIAS:
        inside = inside & (tl.load(bias + batch * bias_batch + rows, inside, 0.0) > -float("inf"))
    scale = tl.load(scales + row_head * HEAD_DIM + dims, wide, other=1.0)
    values = tl.where(inside[:, None], values / scale[None, :], 0.0)
    target = rounded + row_head * padded * BLOCK_D
    target += tl.cast(dims, tl.int64)[:, None] * padded + rows[None, :]
    tl.store(target, to_e4m3(tl.trans(values)))


def quantise_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    smoothing: Smoothing = SMOOTH_KEY,
    value_range: float | None = None,
    key_block: int = 64,
) -> Quantised:
    """`quantise` for 8 bits in the kernel's layout; see the module's docstring."""
    query, key, value = (dense_last_axis(x) for x in (query, key, value))
    factor = softmax_scale(query, scale) * LOG2_E
    bias = key_bias(attn_mask, key)
    bias = None if bias is None else bias.contiguous()
    valid = None if bias is None else (bias > -torch.inf)[:, None, :, None]
    key_mean = mean_over_keys(key, valid) if smoothing.key else None
    added = None if bias is None else (bias * LOG2_E)[:, None, None]
    means = None
    if smoothing.query:
        means, correction = _query_means(query, key, key_mean, factor)
        added = correction if added is None else correction + added
    query_8, query_scale = _int8(query, means, None, factor, QUERY_BLOCK, per_row=True)
    key_8, key_scale = _int8(key, key_mean, bias, 1.0, key_block, per_row=False)
    mean = mean_over_keys(value, valid) if smoothing.value else None
    small = Quantised(
        query_8, query_scale, key_8, key_scale, value, None, _flat(mean), added, key_block
    )
    if value_range is None:
        return small if mean is None else replace(small, value=(value - mean).to(value.dtype))
    return _with_e4m3_value(small, mean, bias, valid, value_range)


def _flat(mean: Tensor | None) -> Tensor | None:
    return None if mean is None else mean[:, :, 0].contiguous()


def _query_means(
    query: Tensor, key: Tensor, key_mean: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    centred = key.to(torch.float32)
    centred = centred if key_mean is None else centred - key_mean
    return query_means(query.to(torch.float32) * factor, centred)


def _int8(
    source: Tensor,
    mean: Tensor | None,
    bias: Tensor | None,
    factor: float,
    block: int,
    *,
    per_row: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = source.shape
    blocks = triton.cdiv(tokens, block)
    padded = tokens if per_row else blocks * block
    rounded = source.new_empty((batch, heads, padded, padded_dim(dim)), dtype=torch.int8)
    scales = source.new_empty((batch, heads, tokens if per_row else blocks), dtype=torch.float32)
    per_block = mean is not None and mean.shape[2] > 1
    round_int8[(blocks, batch * heads)](
        *(source, source if mean is None else mean.contiguous(), source if bias is None else bias),
        *(rounded, scales, *strides(source), (mean.shape[2] if mean is not None else 0) * dim),
        *(dim if per_block else 0, 0 if bias is None else bias.stride(0)),
        *(heads, tokens, padded, factor),
        HEAD_DIM=dim,
        BLOCK_D=padded_dim(dim),
        BLOCK=block,
        PER_ROW=per_row,
        HAS_MEAN=mean is not None,
        HAS_BIAS=bias is not None,
    )
    return rounded, scales


def _with_e4m3_value(
    small: Quantised, mean: Tensor | None, bias: Tensor | None, valid: Tensor | None, largest: float
) -> Quantised:
    value = small.value
    batch, heads, tokens, dim = value.shape
    filling = 0.0 if mean is None else mean.to(value.dtype)
    low, high = (value if valid is None else torch.where(valid, value, filling)).aminmax(dim=2)
    low, high = low.to(torch.float32), high.to(torch.float32)
    if mean is not None:
        low, high = low - mean[:, :, 0], high - mean[:, :, 0]
    scales = (torch.maximum(high, -low) / largest).clamp_min(_TINY)
    blocks = triton.cdiv(tokens, small.key_block)
    shape = (batch, heads, padded_dim(dim), blocks * small.key_block)
    rounded = torch.empty(shape, dtype=torch.float8_e4m3fn, device=value.device)
    round_e4m3_transposed[(blocks, batch * heads)](
        *(value, value if mean is None else mean.contiguous(), value if bias is None else bias),
        *(scales, rounded, *strides(value), 0 if bias is None else bias.stride(0)),
        *(heads, tokens, shape[3]),
        HEAD_DIM=dim,
        BLOCK_D=shape[2],
        BLOCK=small.key_block,
        HAS_MEAN=mean is not None,
        HAS_BIAS=bias is not None,
    )
    return replace(small, value=rounded, value_scale=scales)

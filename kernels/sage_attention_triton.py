# ruff: noqa: N803 -- Triton's compile-time arguments are capitals
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""SageAttention in Triton: INT8 scores, then PV in half precision or in e4m3.

The e4m3 product is summed on two levels, since the tensor cores keep only about 22 bits of a
running sum: each key block is summed from zero and then added in fp32. Compute capability 8.9 and
12.x do that with the fp16-accumulating instruction (SageAttention2++), for which V is scaled so
that a block of 64 keys stays below fp16's largest number; 9.0 and 10.x with fp32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.attention_inputs import output_like
from accel.kernels.attention_softmax_triton import (
    LOWEST,
    capability_of,
    padded_dim,
    softmax_step,
    strides,
    tile,
    to_e4m3,
)
from accel.kernels.flash_attention_triton import Tile
from accel.kernels.sage_attention_quantise import E4M3_MAX, QUERY_BLOCK, Quantised
from accel.kernels.sage_attention_quantise_triton import quantise_triton

FP16_SUM_RANGE = 2.25
"""V's range for fp16 sums: 64 keys · 448 · 2.25 < 65504."""

# As in flash_attention_triton, by whether PV is e4m3.
TILES = {
    False: {
        80: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
        86: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        90: {64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 3), 256: Tile(64, 64, 4, 2)},
        120: {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},
    },
    True: {
        89: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
        90: {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
        120: {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},
    },
}


@triton.jit
def sage_block(
    query,
    key,
    key_scale,
    value,
    value_token,
    bias,
    output,
    total,
    highest,
    query_scale,
    start,
    rows,
    keys,
    padded_keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
    FP16_SUM: tl.constexpr,
):
    """One block of keys from `start`; keys and e4m3 values are padded: only scores are masked."""
    columns, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = start + columns < keys
    first = tl.cast(start, tl.int64)
    key_block = tl.load(key + first * BLOCK_D + columns[None, :] * BLOCK_D + dims[:, None])
    products = tl.dot(query, key_block).to(tl.float32)
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (start + columns[None, :] <= rows[:, None])
        products = tl.where(seen, products, -float("inf"))
    factor = query_scale * tl.load(key_scale + start // BLOCK_N)
    added = factor
    if HAS_BIAS:
        added = tl.load(bias + start + columns, mask=inside, other=0.0)
    # log₂ 448 lifts P from [0, 1] to e4m3's range.
    weights, shrink, highest, total = softmax_step(
        products, factor, added, highest, total, HAS_BIAS, 8.807354922057604 if FP8 else 0.0
    )
    output = output * shrink[:, None]
    if FP8:
        block = tl.load(value + first + dims[None, :] * padded_keys + columns[:, None])
        small = to_e4m3(weights)
        if FP16_SUM:
            output += tl.dot(small, block, out_dtype=tl.float16).to(tl.float32)
        else:
            output = tl.dot(small, block, output, max_num_imprecise_acc=BLOCK_N)
    else:
        at = value + first * value_token + columns[:, None] * value_token + dims[None, :]
        if MASKED:
            block = tl.load(at, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM < BLOCK_D:
            block = tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            block = tl.load(at)
        output = tl.dot(weights.to(block.dtype), block, output, input_precision="ieee")
    return output, total, highest


@triton.jit
def sage_forward(
    query,
    query_scale,
    key,
    key_scale,
    value,
    value_scale,
    value_mean,
    bias,
    output,
    value_batch,
    value_head,
    value_token,
    output_batch,
    output_head,
    output_token,
    bias_batch,
    bias_head,
    bias_block,
    heads,
    group,
    queries,
    keys,
    padded_keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
    FP16_SUM: tl.constexpr,
):
    """Grid (query blocks, batch · heads); tensors as `quantise_triton` lays them out."""
    first = tl.program_id(0) * BLOCK_M
    row_head = tl.cast(tl.program_id(1), tl.int64)
    batch, head = row_head // heads, row_head % heads
    key_head = batch * (heads // group) + head // group
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    present, wide = rows < queries, dims < HEAD_DIM
    places = row_head * queries + rows
    block = tl.load(query + places[:, None] * BLOCK_D + dims, mask=present[:, None], other=0)
    factors = tl.load(query_scale + places, mask=present, other=1.0)
    key += key_head * padded_keys * BLOCK_D
    key_scale += key_head * (padded_keys // BLOCK_N)
    if FP8:
        value += key_head * padded_keys * BLOCK_D
    else:
        value += batch * value_batch + (head // group) * value_head
    bias += batch * bias_batch + head * bias_head + first // QUERY_BLOCK * bias_block
    summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    end = keys
    if CAUSAL:
        whole = tl.minimum(whole, first // BLOCK_N * BLOCK_N)
        end = tl.minimum(keys, first + BLOCK_M)
    for start in range(0, whole, BLOCK_N):
        summed, total, highest = sage_block(
            *(block, key, key_scale, value, value_token, bias, summed, total, highest, factors),
            *(start, rows, keys, padded_keys, HEAD_DIM, BLOCK_D, BLOCK_N),
            *(HAS_BIAS, False, CAUSAL, FP8, FP16_SUM),
        )
    for start in range(whole, end, BLOCK_N):
        summed, total, highest = sage_block(
            *(block, key, key_scale, value, value_token, bias, summed, total, highest, factors),
            *(start, rows, keys, padded_keys, HEAD_DIM, BLOCK_D, BLOCK_N),
            *(HAS_BIAS, True, CAUSAL, FP8, FP16_SUM),
        )
    summed = summed / tl.where(total > 0.0, total, 1.0)[:, None]
    if FP8:
        summed *= tl.load(value_scale + key_head * HEAD_DIM + dims, wide, other=0.0)[None, :]
    if HAS_MEAN:
        mean = tl.load(value_mean + key_head * HEAD_DIM + dims, wide, other=0.0)
        summed += tl.where((total > 0.0)[:, None], mean[None, :], 0.0)
    at = output + batch * output_batch + head * output_head
    at += tl.cast(rows, tl.int64)[:, None] * output_token + dims[None, :]
    tl.store(at, summed.to(output.dtype.element_ty), mask=present[:, None] & wide[None, :])


def sage_triton(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, fp8: bool, **settings: Any
) -> Tensor:
    """Quantise (`quantise_triton` takes `settings`) and attend; heads first."""
    capability = capability_of(query)
    fp16_sum = fp8 and sums_in_fp16(capability)
    shape = sage_tile(query, fp8)
    value_range = None
    if fp8:
        value_range = FP16_SUM_RANGE if fp16_sum else E4M3_MAX
    small = quantise_triton(
        query, key, value, value_range=value_range, key_block=shape.keys, **settings
    )
    return attend(
        small, output_like(query), key.shape[2], shape, is_causal=is_causal, fp16_sum=fp16_sum
    )


def attend(
    small: Quantised,
    output: Tensor,
    keys: int,
    shape: Tile,
    *,
    is_causal: bool = False,
    fp16_sum: bool = False,
) -> Tensor:
    """The kernel on tensors of `quantise_triton`, into `output`; `keys` before padding."""
    batch, heads, queries, dim = output.shape
    fp8, bias = small.value_scale is not None, small.bias
    sage_forward[(triton.cdiv(queries, shape.queries), batch * heads)](
        *(small.query, small.query_scale, small.key, small.key_scale, small.value),
        *(x if x is not None else output for x in (small.value_scale, small.value_mean, bias)),
        output,
        *((0, 0, 0) if fp8 else strides(small.value)),
        *strides(output),
        *((0, 0, 0) if bias is None else _bias_strides(bias)),
        *(heads, heads // small.key.shape[1], queries, keys, small.key.shape[2]),
        HEAD_DIM=dim,
        BLOCK_D=padded_dim(dim),
        BLOCK_M=shape.queries,
        BLOCK_N=shape.keys,
        QUERY_BLOCK=QUERY_BLOCK,
        HAS_BIAS=bias is not None,
        HAS_MEAN=small.value_mean is not None,
        CAUSAL=is_causal,
        FP8=fp8,
        FP16_SUM=fp16_sum,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return output


def _bias_strides(bias: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and query block, 0 where the bias is shared."""
    return tuple(bias.stride(axis) if bias.shape[axis] > 1 else 0 for axis in range(3))  # type: ignore[return-value]


def sums_in_fp16(capability: int) -> bool:
    """Whether the e4m3 product accumulates a key block in fp16 (compute capability 8.9, 12.x)."""
    return capability == 89 or capability >= 120


def sage_tile(query: Tensor, fp8: bool) -> Tile:
    """The tile for this device; fp32 values take twice the memory, so a small one."""
    if query.dtype.itemsize == 4 and not fp8:
        return Tile(64, 32, 4, 2)
    capability = max(capability_of(query), 89 if fp8 else 80)
    found: Tile = tile(TILES[fp8], capability, padded_dim(query.shape[-1]))
    return found

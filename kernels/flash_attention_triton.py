# ruff: noqa: N803 -- Triton's compile-time arguments are capitals
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""FlashAttention-2 forward in Triton: one program owns a block of queries and walks the keys."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.attention_inputs import LOG2_E, key_bias, output_like, softmax_scale
from accel.kernels.attention_softmax_triton import (
    LOWEST,
    capability_of,
    dense_last_axis,
    padded_dim,
    softmax_step,
    strides,
    tile,
)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one block, warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# Keyed by compute capability, then padded head_dim: the compile report (docs/kernels.md) has no
# spills and fits shared memory for each of these.
TILES = {
    80: {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    86: {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    90: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2)},
    120: {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
}


@triton.jit
def attend_block(
    query,
    key,
    key_token,
    value,
    value_token,
    bias,
    output,
    total,
    highest,
    factor,
    start,
    rows,
    keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One block of keys from `start`, added to the running output; `MASKED` checks its ends."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = start + columns < keys
    first = tl.cast(start, tl.int64)
    keys_at = key + first * key_token + columns[None, :] * key_token + dims[:, None]
    values_at = value + first * value_token + columns[:, None] * value_token + dims[None, :]
    added = factor
    if HAS_BIAS:
        added = tl.load(bias + start + columns, mask=inside, other=0.0)
    if MASKED:
        key_block = tl.load(keys_at, mask=inside[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        key_block = tl.load(keys_at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    else:
        key_block = tl.load(keys_at)
    products = tl.dot(query, key_block, input_precision="ieee")
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (start + columns[None, :] <= rows[:, None])
        products = tl.where(seen, products, -float("inf"))
    weights, shrink, highest, total = softmax_step(
        products, factor, added, highest, total, HAS_BIAS, 0.0
    )
    if MASKED:
        value_block = tl.load(
            values_at, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
        )
    elif HEAD_DIM < BLOCK_D:
        value_block = tl.load(values_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        value_block = tl.load(values_at)
    weights = weights.to(value_block.dtype)
    output = tl.dot(weights, value_block, output * shrink[:, None], input_precision="ieee")
    return output, total, highest


@triton.jit
def load_rows(
    source,
    token,
    start,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows from `start` as (BLOCK_M, BLOCK_D), zeros outside."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (start + rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    first = tl.cast(start, tl.int64)
    return tl.load(source + first * token + rows[:, None] * token + dims, mask=inside, other=0.0)


@triton.jit
def store_rows(
    target,
    token,
    start,
    count,
    output,
    total,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """output / total to the rows from `start`; a row of total 0 saw no key and gives 0."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (start + rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    output = output / tl.where(total > 0.0, total, 1.0)[:, None]
    at = target + tl.cast(start, tl.int64) * token + rows[:, None] * token + dims
    tl.store(at, output.to(target.dtype.element_ty), mask=inside)


@triton.jit
def flash_forward(
    query,
    key,
    value,
    bias,
    output,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    output_batch,
    output_head,
    output_token,
    bias_batch,
    heads,
    group,
    queries,
    keys,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Grid (query blocks, batch · heads); `factor` is softmax scale · log₂e."""
    first = tl.program_id(0) * BLOCK_M
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    block = load_rows(
        *(query + batch * query_batch + head * query_head, query_token, first, queries),
        *(HEAD_DIM, BLOCK_D, BLOCK_M),
    )
    key += batch * key_batch + (head // group) * key_head
    value += batch * value_batch + (head // group) * value_head
    bias += batch * bias_batch
    summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    factors = tl.zeros((BLOCK_M,), tl.float32) + factor
    whole = keys // BLOCK_N * BLOCK_N
    end = keys
    if CAUSAL:
        whole = tl.minimum(whole, first // BLOCK_N * BLOCK_N)
        end = tl.minimum(keys, first + BLOCK_M)
    for start in range(0, whole, BLOCK_N):
        summed, total, highest = attend_block(
            *(block, key, key_token, value, value_token, bias, summed, total, highest, factors),
            *(start, rows, keys, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, False, CAUSAL),
        )
    for start in range(whole, end, BLOCK_N):
        summed, total, highest = attend_block(
            *(block, key, key_token, value, value_token, bias, summed, total, highest, factors),
            *(start, rows, keys, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_BIAS, True, CAUSAL),
        )
    store_rows(
        *(output + batch * output_batch + head * output_head, output_token, first, queries),
        *(summed, total, HEAD_DIM, BLOCK_D, BLOCK_M),
    )


def flash_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    shape: Tile | None = None,
) -> Tensor:
    """The kernel on heads-first tensors, `shape` in place of the table's tile."""
    query, key, value = (dense_last_axis(x) for x in (query, key, value))
    batch, heads, queries, dim = query.shape
    shape = shape or flash_tile(query)
    bias = key_bias(attn_mask, key)
    bias = query if bias is None else (bias * LOG2_E).contiguous()
    output = output_like(query)
    flash_forward[(triton.cdiv(queries, shape.queries), batch * heads)](
        *(query, key, value, bias, output),
        *(*strides(query), *strides(key), *strides(value), *strides(output), bias.stride(0)),
        *(
            heads,
            heads // key.shape[1],
            queries,
            key.shape[2],
            softmax_scale(query, scale) * LOG2_E,
        ),
        HEAD_DIM=dim,
        BLOCK_D=padded_dim(dim),
        BLOCK_M=shape.queries,
        BLOCK_N=shape.keys,
        HAS_BIAS=attn_mask is not None,
        CAUSAL=is_causal,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return output


def flash_tile(query: Tensor) -> Tile:
    """The tile for this device; fp32 takes twice the memory, so a small one."""
    if query.dtype.itemsize == 4:
        return Tile(32, 32, 4, 2)
    found: Tile = tile(TILES, capability_of(query), padded_dim(query.shape[-1]))
    return found

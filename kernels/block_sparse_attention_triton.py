# ruff: noqa: N803 -- Triton's compile-time arguments are capitals
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Block-sparse attention in Triton: one program owns a block of queries and walks its key list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from accel.kernels.attention_inputs import LOG2_E, output_like, softmax_scale
from accel.kernels.attention_softmax_triton import (
    LOWEST,
    capability_of,
    dense_last_axis,
    padded_dim,
    strides,
)
from accel.kernels.block_sparse_attention import block_lists
from accel.kernels.flash_attention_triton import attend_block, load_rows, store_rows


@triton.jit
def block_sparse_forward(
    query,
    key,
    value,
    counts,
    listed,
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
    mask_batch,
    mask_head,
    heads,
    group,
    queries,
    keys,
    key_blocks,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (query blocks, batch · heads); only a list's last block can be the short one.

    A block of keys is attended to in parts of BLOCK_N, so that the scores fit in registers.
    """
    block_row = tl.program_id(0)
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    first = block_row * BLOCK
    rows = first + tl.arange(0, BLOCK)
    block = load_rows(
        *(query + batch * query_batch + head * query_head, query_token, first, queries),
        *(HEAD_DIM, BLOCK_D, BLOCK),
    )
    key += batch * key_batch + (head // group) * key_head
    value += batch * value_batch + (head // group) * value_head
    place = batch * mask_batch + head * mask_head + block_row
    count = tl.load(counts + place)
    listed += place * key_blocks
    summed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    factors = tl.zeros((BLOCK,), tl.float32) + factor
    parts: tl.constexpr = BLOCK // BLOCK_N
    for part in range(0, (count - 1) * parts):
        start = tl.load(listed + part // parts) * BLOCK + part % parts * BLOCK_N
        summed, total, highest = attend_block(
            *(block, key, key_token, value, value_token, query, summed, total, highest, factors),
            *(start, rows, keys, HEAD_DIM, BLOCK_D, BLOCK_N, False, False, False),
        )
    for part in range(tl.maximum(count - 1, 0) * parts, count * parts):
        start = tl.load(listed + part // parts) * BLOCK + part % parts * BLOCK_N
        summed, total, highest = attend_block(
            *(block, key, key_token, value, value_token, query, summed, total, highest, factors),
            *(start, rows, keys, HEAD_DIM, BLOCK_D, BLOCK_N, False, True, False),
        )
    store_rows(
        *(output + batch * output_batch + head * output_head, output_token, first, queries),
        *(summed, total, HEAD_DIM, BLOCK_D, BLOCK),
    )


def block_sparse_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """The kernel on heads-first tensors."""
    query, key, value = (dense_last_axis(x) for x in (query, key, value))
    batch, heads, queries, dim = query.shape
    counts, listed = block_lists(block_mask)
    output = output_like(query)
    keys_at_once, warps, stages = launch_shape(
        block_size, padded_dim(dim), query.dtype.itemsize, capability_of(query)
    )
    block_sparse_forward[(counts.shape[2], batch * heads)](
        *(query, key, value, counts.contiguous(), listed.contiguous(), output),
        *(*strides(query), *strides(key), *strides(value), *strides(output)),
        *(counts.stride(axis) if counts.shape[axis] > 1 else 0 for axis in (0, 1)),
        *(heads, heads // key.shape[1], queries, key.shape[2], block_mask.shape[3]),
        softmax_scale(query, scale) * LOG2_E,
        HEAD_DIM=dim,
        BLOCK_D=padded_dim(dim),
        BLOCK=block_size,
        BLOCK_N=keys_at_once,
        num_warps=warps,
        num_stages=stages,
    )
    return output


def launch_shape(block_size: int, dim: int, itemsize: int, capability: int) -> tuple[int, int, int]:
    """Keys at once, warps, and as many pipeline stages as shared memory holds."""
    row = dim * itemsize / 1024  # KB of one token of Q, K or V
    room = {80: 160, 90: 224}.get(capability, 96)
    keys = 32 if block_size == 128 and dim >= 128 and room == 96 else min(block_size, 64)
    stages = int((room - row * block_size) // (2 * row * keys))
    return keys, (8 if block_size == 128 or dim >= 128 else 4), max(1, min(3, stages))

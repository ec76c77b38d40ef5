"""The Triton kernels of `linear_w8a8`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
"""Few rows (a time embedding, one token) would leave the large tile's rows empty."""


def w8a8_triton(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times INT8 `values` (out, in) with fp32 `scale` (out, 1), in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    quantised, row_scale = quantise_rows_triton(rows)
    outputs = values.shape[0]
    output = torch.empty(len(rows), outputs, dtype=x.dtype, device=x.device)
    tile = SMALL if len(rows) <= SMALL["BLOCK_M"] else LARGE
    grid = (triton.cdiv(len(rows), tile["BLOCK_M"]), triton.cdiv(outputs, tile["BLOCK_N"]))
    multiply[grid](
        *(quantised, values, row_scale, scale, bias, output),
        *(len(rows), outputs, x.shape[-1]),
        HAS_BIAS=bias is not None,
        **tile,
    )
    return output.view(*x.shape[:-1], outputs)


def quantise_rows_triton(rows: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 and one fp32 scale for each row, as `linear_formats.int8_rows`."""
    rows = rows.contiguous()
    quantised = torch.empty_like(rows, dtype=torch.int8)
    scale = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    block = min(triton.next_power_of_2(rows.shape[1]), 4096)
    quantise_rows[(len(rows),)](rows, quantised, scale, rows.shape[1], BLOCK=block)
    return quantised, scale


@triton.jit
def quantise_rows(rows, quantised, scale, inputs, BLOCK: tl.constexpr):  # noqa: N803
    """One program a row: its largest magnitude, then its values."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, inputs, BLOCK):
        inside = start + columns < inputs
        x = tl.load(rows + row * inputs + start + columns, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    factor = tl.maximum(tl.max(largest, 0), 1e-12) / 127
    tl.store(scale + row, factor)
    for start in range(0, inputs, BLOCK):
        inside = start + columns < inputs
        x = tl.load(rows + row * inputs + start + columns, mask=inside, other=0.0)
        ratio = x.to(tl.float32) / factor
        away = tl.where(ratio < 0, ratio - 0.5, ratio + 0.5)  # the cast to INT8 truncates
        tl.store(quantised + row * inputs + start + columns, away.to(tl.int8), mask=inside)


@triton.jit
def multiply(
    rows, weight, row_scale, scale, bias, output,
    count, outputs, inputs,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program a tile of the output: INT8 products summed in INT32, scaled once at the end."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = rows + m[:, None].to(tl.int64) * inputs + k[None, :]
    right = weight + n[None, :].to(tl.int64) * inputs + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + k < inputs
        x = tl.load(left + start, mask=(m[:, None] < count) & inside[None, :], other=0)
        w = tl.load(right + start, mask=(n[None, :] < outputs) & inside[:, None], other=0)
        total += tl.dot(x, w)
    row_factor = tl.load(row_scale + m, mask=m < count, other=0.0)
    factor = tl.load(scale + n, mask=n < outputs, other=0.0)
    result = total.to(tl.float32) * row_factor[:, None] * factor[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    place = output + m[:, None].to(tl.int64) * outputs + n[None, :]
    inside_tile = (m[:, None] < count) & (n[None, :] < outputs)
    tl.store(place, result.to(output.dtype.element_ty), mask=inside_tile)

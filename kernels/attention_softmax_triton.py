# ruff: noqa: N803 -- Triton's compile-time arguments are capitals
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The online softmax that all Triton attention kernels share, and their common small pieces."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's CPU interpreter, whose casts to e4m3 round wrongly."""

LOWEST = tl.constexpr(-1e30)
"""Start of the running maximum: finite, so that a row which sees no key gives weights of 0."""


@triton.jit
def softmax_step(
    products, factor, bias, highest, total, HAS_BIAS: tl.constexpr, LIFT: tl.constexpr
):
    """Weights exp2(factor · products + bias − running maximum + LIFT) and the new running values.

    `products` is (rows, keys), `factor` (rows) and positive, `bias` (keys). Without a bias the
    maximum is taken before scaling, which leaves one multiply-add and one exp2 an element.
    """
    if HAS_BIAS:
        products = products * factor[:, None] + bias[None, :]
        risen = tl.maximum(highest, tl.max(products, 1))
        weights = tl.exp2(products - (risen - LIFT)[:, None])
    else:
        risen = tl.maximum(highest, tl.max(products, 1) * factor)
        weights = tl.exp2(products * factor[:, None] - (risen - LIFT)[:, None])
    shrink = tl.exp2(highest - risen)
    return weights, shrink, risen, total * shrink + tl.sum(weights, 1)


@triton.jit
def on_e4m3_grid(values):
    """fp32 values rounded to the nearest even e4m3 value, still fp32; exact to cast afterwards."""
    exponent = ((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    step = ((tl.maximum(exponent, -6) + 124) << 23).to(tl.float32, bitcast=True)
    shift = step * 12582912.0  # 1.5 · 2²³: adding it leaves no bit below the step
    return (values + shift) - shift


@triton.jit
def to_e4m3(values):
    """fp32 to e4m3, rounding to nearest even also in the interpreter."""
    if INTERPRETED:
        values = on_e4m3_grid(values)
    return values.to(tl.float8e4nv)


def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of a heads-first tensor."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def dense_last_axis(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its last axis is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded_dim(head_dim: int) -> int:
    """The head dimension inside kernels: the next power of two from 16."""
    return max(16, triton.next_power_of_2(head_dim))  # type: ignore[no-any-return]


def capability_of(tensor: torch.Tensor) -> int:
    """The device's compute capability as 80, 89, 90 …; 80 stands for a CPU (the interpreter)."""
    if tensor.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def tile(table: dict[int, dict[int, Any]], capability: int, dim: int) -> Any:
    """The entry of the newest architecture not above `capability`, for this padded head_dim."""
    arch = max(arch for arch in table if arch <= capability)
    return table[arch][max(64, dim)]

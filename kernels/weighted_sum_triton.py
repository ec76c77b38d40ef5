"""The Triton kernel of `weighted_sum`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def weighted_sum_triton(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ weightᵢ · tensorᵢ of contiguous tensors of one shape and dtype, summed in fp32."""
    output = torch.empty_like(tensors[0])
    count = output.numel()
    grid = (triton.cdiv(count, BLOCK),)
    factors = tuple(float(weight) for weight in weights)
    scaled_sum[grid](tuple(tensors), factors, output, count, BLOCK=BLOCK, num_warps=8)
    return output


@triton.jit
def scaled_sum(tensors, weights, output, count, BLOCK: tl.constexpr):  # noqa: N803
    """One program sums one block of all tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(len(tensors)):
        total += (
            tl.load(tensors[index] + at, mask=inside, other=0.0).to(tl.float32) * weights[index]
        )
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)

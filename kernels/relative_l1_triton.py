"""The Triton kernel of `relative_l1`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
PROGRAMS = 1024


def mean_distance_triton(new: Tensor, old: Tensor, scale: Tensor | None = None) -> Tensor:
    """(mean|new − old|, mean|scale|) of contiguous tensors of one shape and dtype, fp32."""
    count = new.numel()
    programs = min(triton.cdiv(count, BLOCK), PROGRAMS)
    partial = torch.zeros(2, programs, dtype=torch.float32, device=new.device)
    distance_sums[(programs,)](
        *(new, old, new if scale is None else scale, partial, count, programs),
        SIZE="none" if scale is None else "old" if scale is old else "other",
        BLOCK=BLOCK,
        num_warps=8,
    )
    means = partial.sum(1) / count
    return means if scale is not None else torch.stack((means[0], torch.ones_like(means[0])))


@triton.jit
def distance_sums(
    new, old, scale, partial, count, programs,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program sums every `programs`-th block; its two sums are one entry of `partial`."""
    program = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    distance = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = tl.full((1,), BLOCK, tl.int64) * block + places
        inside = at < count
        a = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(old + at, mask=inside, other=0.0).to(tl.float32)
        distance += tl.abs(a - b)
        if SIZE == "old":
            size += tl.abs(b)
        if SIZE == "other":
            size += tl.abs(tl.load(scale + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(partial + program, tl.sum(distance, 0))
    tl.store(partial + programs + program, tl.sum(size, 0))

"""How far two tensors are apart, in one pass: what every adaptive cache asks at every step.

Torch makes three to five passes (two casts, a difference, a magnitude, a mean).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from accel.kernels.triton_device import attempt

if TYPE_CHECKING:
    from torch import Tensor


def mean_distance(new: Tensor, old: Tensor, scale: Tensor | None = None) -> Tensor:
    """(mean|new − old|, mean|scale|) as two fp32 numbers on the tensors' device.

    The second is 1 without `scale`. By Triton on CUDA for contiguous tensors of one shape and
    dtype, the sums in a fixed order; else by the reference, which also broadcasts.
    """
    tensors = [new, old] if scale is None else [new, old, scale]
    alike = all(each.shape == new.shape and each.dtype == new.dtype for each in tensors)
    if alike and all(each.is_contiguous() for each in tensors):
        found = attempt("mean_distance", new, lambda: _by_triton(new, old, scale))
        if found is not None:
            return found
    return mean_distance_reference(new, old, scale)


def _by_triton(new: Tensor, old: Tensor, scale: Tensor | None) -> Tensor:
    from accel.kernels.relative_l1_triton import mean_distance_triton

    return mean_distance_triton(new, old, scale)


def mean_distance_reference(new: Tensor, old: Tensor, scale: Tensor | None = None) -> Tensor:
    """The same by torch's operations."""
    difference = (new.float() - old.float()).abs().mean()
    size = torch.ones_like(difference) if scale is None else scale.float().abs().mean()
    return torch.stack((difference, size))

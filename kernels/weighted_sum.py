"""A weighted sum of stored tensors in one pass: what every extrapolation ends in.

Torch reads and writes the fp32 total once for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel.kernels.triton_device import attempt

if TYPE_CHECKING:
    from torch import Tensor

MOST = 6
"""Tensors that the kernel sums; more go by torch."""


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ weightᵢ · tensorᵢ, summed in fp32, in the first tensor's dtype.

    By Triton on CUDA for 2 to `MOST` contiguous tensors of one shape and dtype, else by the
    reference.
    """
    first = tensors[0]
    alike = all(each.shape == first.shape and each.dtype == first.dtype for each in tensors)
    contiguous = all(each.is_contiguous() for each in tensors)
    if alike and contiguous and 1 < len(tensors) <= MOST:
        found = attempt("weighted_sum", first, lambda: _by_triton(weights, tensors))
        if found is not None:
            return found
    return weighted_sum_reference(weights, tensors)


def _by_triton(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    from accel.kernels.weighted_sum_triton import weighted_sum_triton

    return weighted_sum_triton(weights, tensors)


def weighted_sum_reference(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The same by torch's operations."""
    total = tensors[0].float() * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)

"""What every attention kernel accepts, and whether its Triton form can run on given tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.triton_device import why_not as device_why_not
from accel.method import AccelError

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


def why_not(query: Tensor, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why the Triton kernels cannot run on this tensor, or None when they can.

    `capability` is the least CUDA compute capability that the kernel needs.
    """
    reason = device_why_not(query.device, capability)
    if reason is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{query.dtype} is not one of float16, bfloat16, float32"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {query.shape[-1]} is above {MAX_HEAD_DIM}"
    return None


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `AccelError` unless these are (batch, heads, tokens, head_dim) that fit together."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise AccelError(f"{shapes}: each must be (batch, heads, tokens, head_dim)")
    if key.shape != value.shape or query.shape[0] != key.shape[0]:
        raise AccelError(f"{shapes}: key and value need one shape, and all three one batch")
    if query.shape[3] != key.shape[3] or key.shape[2] == 0 or query.shape[1] % key.shape[1]:
        raise AccelError(
            f"{shapes}: head_dim must agree, keys not be empty, and query heads be a multiple of "
            "the key heads"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise AccelError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype} must be one")


def softmax_scale(query: Tensor, scale: float | None) -> float:
    """`scale`, or 1/√head_dim; `AccelError` unless it is positive."""
    if scale is not None and not scale > 0:
        raise AccelError(f"scale={scale!r}: must be a positive number or None")
    return float(query.shape[-1]) ** -0.5 if scale is None else float(scale)


def key_bias(attn_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """A mask over keys as (batch, keys) fp32 to add to the scores (natural logarithm), or None.

    Accepts bool (True = attend) or floating masks of shape (batch, keys), (batch, 1, 1, keys) or
    with batch 1; a mask that differs by head or query is an `AccelError`.
    """
    if attn_mask is None:
        return None
    batch, keys = key.shape[0], key.shape[2]
    shape = tuple(attn_mask.shape)
    if attn_mask.dim() == 4 and shape[1:3] == (1, 1):
        attn_mask = attn_mask[:, 0, 0]
    if attn_mask.dim() != 2 or attn_mask.shape[0] not in (1, batch) or attn_mask.shape[1] != keys:
        raise AccelError(
            f"attn_mask of shape {shape}: this kernel takes masks over keys only, "
            f"({batch}, {keys}) or ({batch}, 1, 1, {keys})"
        )
    if attn_mask.dtype == torch.bool:
        zero = torch.zeros((), device=key.device)
        attn_mask = torch.where(attn_mask, zero, zero - torch.inf)
    return attn_mask.to(torch.float32).expand(batch, keys)


def to_heads_first(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Views as (batch, heads, tokens, head_dim) of tensors in "HND" or "NHD" layout.

    Applied to a heads-first result it gives back the caller's layout.
    """
    if layout not in ("HND", "NHD"):
        raise AccelError(f"layout={layout!r}: accepted are 'HND' and 'NHD'")
    return tensors if layout == "HND" else tuple(tensor.transpose(1, 2) for tensor in tensors)


def output_like(query: Tensor) -> Tensor:
    """An empty output in the query's own memory order, so that the caller's reshape is free."""
    if query.transpose(1, 2).is_contiguous():
        batch, heads, tokens, dim = query.shape
        return query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return query.new_empty(query.shape)


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated to `heads` query heads (grouped-query attention)."""
    group = heads // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)

"""Exact attention (FlashAttention-2, Dao 2023) in Triton, and its plain-torch reference.

The base of the low-bit and block-sparse kernels, and exact attention for what vendor kernels do
not take. On Hopper the vendors' kernels are faster than any Triton form at half precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accel.kernels.attention_inputs import (
    check_inputs,
    key_bias,
    repeat_heads,
    softmax_scale,
    to_heads_first,
    why_not,
)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "HND",
) -> Tensor:
    """softmax(scale · QKᵀ + mask) V, by Triton where it can run, else by the reference.

    Tensors are (batch, heads, tokens, head_dim), or (batch, tokens, heads, head_dim) with
    `layout="NHD"`; query heads may be a multiple of key heads. `attn_mask` covers keys only
    (`key_bias`). `is_causal` lets query i see keys ≤ i. A query that may see no key gives 0.
    """
    query, key, value = to_heads_first(layout, query, key, value)
    check_inputs(query, key, value)
    attend: Callable[..., Tensor] = attention_reference
    if why_not(query) is None:
        from accel.kernels.flash_attention_triton import flash_attention_triton

        attend = flash_attention_triton
    with torch.cuda.device_of(query):  # Triton launches on the current device
        output = attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return to_heads_first(layout, output)[0]


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention by its definition, heads first, in fp32 (in fp64 for fp64 tensors)."""
    exact = torch.promote_types(query.dtype, torch.float32)
    key_exact, value_exact = (repeat_heads(x, query.shape[1]).to(exact) for x in (key, value))
    scores = query.to(exact) @ key_exact.mT * softmax_scale(query, scale)
    bias = key_bias(attn_mask, key)
    if bias is not None:
        scores += bias[:, None, None].to(exact)
    if is_causal:
        allowed = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril()
        scores.masked_fill_(~allowed, -torch.inf)
    nothing_seen = scores.amax(dim=-1, keepdim=True) == -torch.inf
    weights = scores.softmax(dim=-1).masked_fill(nothing_seen, 0.0)
    return (weights @ value_exact).to(query.dtype)

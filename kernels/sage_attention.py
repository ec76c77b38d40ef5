"""SageAttention: INT8 scores with half or e4m3 values (Zhang et al. 2024, 2024, 2025).

Differs from the papers in the groups that share a scale (sage_attention_quantise.py). The
references below repeat the kernels' arithmetic key block by key block, rounding included; on a
CPU they are slower than exact attention and serve to see what the precision costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accel.kernels.attention_inputs import check_inputs, repeat_heads, to_heads_first, why_not
from accel.kernels.sage_attention_quantise import (
    E4M3_MAX,
    SMOOTH_BOTH,
    SMOOTH_KEY,
    Quantised,
    Smoothing,
    per_query,
    quantise,
)

INT8_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)


def sage_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "HND",
    smoothing: Smoothing = SMOOTH_KEY,
) -> Tensor:
    """Attention with INT8 QKᵀ and PV in the inputs' own type; shapes as `flash_attention`.

    By Triton on CUDA devices of compute capability ≥ 8.0, else by the reference.
    """
    settings = {"attn_mask": attn_mask, "scale": scale, "smoothing": smoothing}
    return _int8(query, key, value, layout, is_causal, fp8=False, **settings)


def sage_int8_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "HND",
    smoothing: Smoothing = SMOOTH_KEY,
) -> Tensor:
    """Attention with INT8 QKᵀ and e4m3 PV summed on two levels; shapes as `flash_attention`.

    By Triton on CUDA devices of compute capability ≥ 8.9, else by the reference.
    """
    settings = {"attn_mask": attn_mask, "scale": scale, "smoothing": smoothing}
    return _int8(query, key, value, layout, is_causal, fp8=True, **settings)


def _int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: str,
    is_causal: bool,
    fp8: bool,
    **settings: Any,
) -> Tensor:
    query, key, value = to_heads_first(layout, query, key, value)
    check_inputs(query, key, value)
    if why_not(query, FP8_CAPABILITY if fp8 else INT8_CAPABILITY) is None:
        from accel.kernels.sage_attention_triton import sage_triton

        with torch.cuda.device_of(query):  # Triton launches on the current device
            output = sage_triton(query, key, value, is_causal=is_causal, fp8=fp8, **settings)
    else:
        settings["value_range"] = E4M3_MAX if fp8 else None
        output = _by_reference(query, key, value, is_causal, **settings)
    return to_heads_first(layout, output)[0]


def sage_int4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    layout: str = "HND",
    smoothing: Smoothing = SMOOTH_BOTH,
) -> Tensor:
    """Attention with INT4 QKᵀ, in torch only: to see what four bits would cost.

    Triton has no INT4 product; unpacking to INT8 costs more than INT4 saves.
    """
    query, key, value = to_heads_first(layout, query, key, value)
    check_inputs(query, key, value)
    settings: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale, "smoothing": smoothing}
    output = _by_reference(query, key, value, is_causal, bits=4, **settings)
    return to_heads_first(layout, output)[0]


def _by_reference(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **settings: Any
) -> Tensor:
    small = quantise(query, key, value, **settings)
    return sage_reference(small, is_causal=is_causal).to(query.dtype)


def sage_reference(small: Quantised, *, is_causal: bool = False) -> Tensor:
    """Attention of quantised tensors in fp32, (batch, heads, queries, head_dim).

    Online softmax over blocks of keys: P is rounded to V's type relative to the running maximum,
    as in the kernels, while its sum is taken before rounding.
    """
    batch, heads, queries, dim = small.query.shape
    query = small.query.to(torch.float32)
    key, value = (repeat_heads(x, heads).to(torch.float32) for x in (small.key, small.value))
    key_scale = repeat_heads(small.key_scale, heads)
    # e4m3 has its finest relative steps for normal numbers: lift P from [0, 1] to [0, 448].
    lift = math.log2(E4M3_MAX) if small.value_scale is not None else 0.0
    highest = query.new_full((batch, heads, queries, 1), -1e30)
    total, output = torch.zeros_like(highest), query.new_zeros(batch, heads, queries, dim)
    for block, start in enumerate(range(0, key.shape[2], small.key_block)):
        keys = slice(start, start + small.key_block)
        scores = query @ key[:, :, keys].mT * small.query_scale[..., None]
        scores = scores * key_scale[:, :, None, block, None] + _bias_of(small, keys)
        if is_causal:
            ahead = torch.arange(queries)[:, None] < torch.arange(start, start + scores.shape[3])
            scores.masked_fill_(ahead.to(scores.device), -torch.inf)
        risen = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = torch.exp2(scores - risen + lift), torch.exp2(highest - risen)
        rounded = weights.to(small.value.dtype).to(torch.float32)
        output = output * shrink + rounded @ value[:, :, keys]
        total, highest = total * shrink + weights.sum(dim=-1, keepdim=True), risen
    return _finished(small, output, total)


def _bias_of(small: Quantised, keys: slice) -> Tensor | float:
    if small.bias is None:
        return 0.0
    bias = small.bias[..., keys]
    if bias.shape[2] == 1:
        return bias
    return per_query(bias, small.query.shape[2])


def _finished(small: Quantised, output: Tensor, total: Tensor) -> Tensor:
    output = output / total.clamp_min(1e-30)
    if small.value_scale is not None:
        output = output * repeat_heads(small.value_scale, output.shape[1])[:, :, None]
    if small.value_mean is not None:
        mean = repeat_heads(small.value_mean, output.shape[1])[:, :, None]
        output = torch.where(total > 0, output + mean, output)
    return output

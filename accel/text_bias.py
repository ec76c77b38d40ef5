"""Jenga's amplifier: at a smaller size a picture's tokens look more at the text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.method import Handle

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser


def amplify_text(denoiser: Denoiser, method: str, strength: float) -> Handle:
    """While a stage is small, add `strength`·log(full/live places) to picture-to-text logits.

    In joint attention; layers without text tokens stay as they are.
    """

    def attend(call: AttentionCall) -> Tensor:
        run, forward = denoiser.clock.staging, denoiser.forward
        layout = run.layout if run is not None else None
        if forward is None or layout is None or layout.whole or call.is_causal:
            return call.plain()
        grid = denoiser.grid(forward.arguments)
        text = 0 if grid is None else call.query.shape[2] - math.prod(grid)
        where = denoiser.family.text
        if text <= 0 or where is None or call.key.shape[2] != call.query.shape[2]:
            return call.plain()
        bias = strength * math.log(len(layout.spread) / len(layout.pick))
        return biased(call, text, where == "first", bias)

    return intercept(denoiser, self_attention(denoiser, method), attend)


def biased(call: AttentionCall, text: int, text_first: bool, bias: float) -> Tensor:
    """The attention with `bias` on the logits of the picture's queries and the text's keys."""
    tokens, heads = call.query.shape[2], call.query.shape[1]
    words = slice(0, text) if text_first else slice(tokens - text, tokens)
    picture = slice(text, tokens) if text_first else slice(0, tokens - text)
    grouped: dict[str, Any] = {"enable_gqa": True} if call.key.shape[1] != heads else {}
    row = call.query.new_zeros(1, 1, 1, tokens)
    row[..., words] = bias

    def part(rows: slice, added: Tensor) -> Tensor:
        mask = call.attn_mask
        if mask is not None:
            mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            hidden = torch.zeros_like(added).expand(mask.shape)
            as_bias = hidden.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            added = added + as_bias
        return scaled_dot_product_attention(
            *(call.query[:, :, rows], call.key, call.value),
            attn_mask=added,
            scale=call.scale,
            **grouped,
        )

    parts = [part(picture, row), part(words, torch.zeros_like(row))]
    return torch.cat(parts[::-1] if text_first else parts, dim=2)

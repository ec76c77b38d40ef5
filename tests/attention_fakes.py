"""Kernels and calls for the tests of the attention method."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from accel.attention_calls import AttentionCall, AttentionLayer

EMULATED = {"least": 1, "reference": True}
"""Settings under which low-bit references act on a CPU's small models."""


class Fake:
    """A kernel made of a function."""

    exact = True

    def __init__(self, attend: Any, reason: str | None = None) -> None:
        self.attend, self.reason, self.asked = attend, reason, 0

    def why_not(self, query: torch.Tensor, reference: bool = False) -> str | None:
        self.asked += 1
        return self.reason

    def run(self, call: AttentionCall) -> torch.Tensor:
        return self.attend(call)


def a_call(tokens: int = 64, **changes: Any) -> AttentionCall:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, tokens, 16)
    layer = AttentionLayer("attn", None)
    values = {"attn_mask": None, "is_causal": False, "scale": None, **changes}

    def plain() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    return AttentionCall(layer, query, key, value, plain=plain, **values)

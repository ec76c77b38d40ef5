"""Training in bfloat16, on CUDA or a CPU with AMX or AVX512 (lscpu: amx_bf16, avx512_bf16)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def quick(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the blocks; on a CPU, autocast runs attend by `attention` while inside.

    Other CPUs emulate bfloat16, hundreds of times slower. Compiling pays on those with AMX; with
    AVX512 alone it makes a U-Net's step slower.
    """
    for block in blocks:
        block.compile(dynamic=True)
    fused = functional.scaled_dot_product_attention

    def chosen(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        plain = torch.is_autocast_enabled("cpu") and options.get("attn_mask") is None
        return attention(query, key, value) if plain else fused(query, key, value, **options)

    with mock.patch.object(functional, "scaled_dot_product_attention", chosen):
        yield


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √width) v of (batch, heads, tokens, width) by two bfloat16 products.

    torch's fused attention is slow on CPUs in its bfloat16 backward pass.
    """
    with torch.autocast("cpu", enabled=False):
        query, key, value = (each.bfloat16() for each in (query, key, value))
        weights = (query * query.shape[-1] ** -0.5) @ key.mT
        return weights.softmax(-1) @ value

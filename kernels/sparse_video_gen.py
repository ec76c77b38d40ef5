"""Sparse VideoGen: every head looks inside frames, or at the same place across frames."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.attention_calls import AttentionCall
from accel.denoiser import Denoiser
from accel.kernels.attention_inputs import repeat_heads, softmax_scale
from accel.kernels.sparse_blocks import attach_sparse, block_places, check_sparse
from accel.kernels.token_tiles import Grid
from accel.method import Handle, check, is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseVideoGen:
    """Per head one of two static masks, chosen by attending densely from a few queries.

    Xi et al., "Sparse VideoGen", ICML 2025. A spatial head keeps the `keep` share of key blocks
    that is nearest in frames, a temporal one that which is nearest in place; `rows` sampled queries
    are computed densely and with both masks, and the mask with the smaller squared error is taken,
    for each head and row of the batch in every call. The authors keep 0.30 (Wan), 0.25
    (HunyuanVideo) and leave the first 20 % and 10 % of the steps dense.

    Differs: tokens lie in tiles in which both masks are block masks, so no head needs a layout of
    its own, and the first layers are not kept dense. Text, masks, `tile` and `least` as in `NABLA`.
    Sampled queries are the same in every run. Holds nothing.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"keep": 0.6}, {"keep": 0.45}, {})

    keep: float = 0.3
    rows: int = 64
    tile: Grid = (1, 8, 8)
    warmup: float = 0.2
    least: int = 2048

    def __post_init__(self) -> None:
        check(is_number(self.keep) and 0 < self.keep <= 1, self, "keep", "a number in (0, 1]")
        check(is_count(self.rows, 1), self, "rows", "a whole number ≥ 1")
        check_sparse(self)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        return attach_sparse(self, denoiser, self._choose)

    def _choose(self, call: AttentionCall, grid: Grid, text: int) -> Tensor:
        size, tokens = math.prod(self.tile), call.query.shape[2]
        blocks, video = -(-tokens // size), math.prod(grid) // size
        masks = torch.ones(2, blocks, blocks, dtype=torch.bool, device=call.query.device)
        masks[:, :video, :video] = two_masks(grid, self.tile, video, self.keep, masks.device)
        sample = sampled(tokens - text, self.rows, masks.device)
        return masks[_errors(call, masks, sample, size).argmin(0)]


@functools.lru_cache(maxsize=4)
def sampled(tokens: int, rows: int, device: torch.device) -> Tensor:
    """The same `rows` of the picture's tokens for every layer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(tokens, generator=generator)[:rows].to(device)


@functools.lru_cache(maxsize=4)
def two_masks(grid: Grid, tile: Grid, blocks: int, keep: float, device: torch.device) -> Tensor:
    """The spatial and the temporal mask of the video's whole blocks, bool (2, blocks, blocks)."""
    places = block_places(grid, tile, blocks, device)
    apart = (places[:, None] - places[None]).abs()
    frames, away = apart[..., 0], apart[..., 1:].square().sum(-1).sqrt()
    longest = 1 + max(grid) * 2
    both = torch.stack((frames * longest + away, away * longest + frames))
    nearest = both.argsort(dim=-1, stable=True)[..., : max(round(keep * blocks), 1)]
    return torch.zeros_like(both, dtype=torch.bool).scatter(-1, nearest, True)


def _errors(call: AttentionCall, masks: Tensor, sample: Tensor, size: int) -> Tensor:
    """Squared error of each mask at the sampled queries, (masks, batch, heads)."""
    heads, keys = call.query.shape[1], call.key.shape[2]
    key, value = (repeat_heads(each, heads).float() for each in (call.key, call.value))
    scale = softmax_scale(call.query, call.scale)
    scores = call.query[:, :, sample].float() @ key.mT * scale
    right = scores.softmax(-1) @ value
    found = []
    for mask in masks:
        seen = mask[sample // size].repeat_interleave(size, -1)[:, :keys]
        made = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
        found.append((made - right).square().sum((-1, -2)))
    return torch.stack(found)

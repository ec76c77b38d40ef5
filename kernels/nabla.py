"""NABLA: each head attends to the blocks of keys that hold most of its attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.attention_calls import AttentionCall
from accel.denoiser import Denoiser
from accel.kernels.attention_inputs import repeat_heads, softmax_scale
from accel.kernels.sparse_blocks import (
    attach_sparse,
    block_means,
    block_places,
    check_sparse,
    watch_blocks,
)
from accel.kernels.token_tiles import Grid
from accel.method import Handle, check, is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 8
"""Of a layer's block map that are kept: 40 layers of 40 heads at 500 blocks come to 26 MB."""


@dataclass(frozen=True)
class NABLA:
    """Attend to the key blocks that hold a share `mass` of the block-wise attention of each row.

    Mikhailov et al., "∇NABLA: Neighborhood Adaptive Block-Level Attention", 2025. Tokens are put in
    space-time tiles; queries and keys are averaged over each block; softmax of the averages'
    products gives every row of blocks the smallest set of key blocks with at least `mass` of the
    sum; exact attention runs over those blocks. Text tokens of joint attention always attend and
    are always attended to. The first `warmup` share of the steps is dense. `window` (frames, rows,
    columns): tiles so many tokens around are kept too, the paper's union with sliding tiles.

    For self-attention; a layer with fewer than `least` tokens, with a mask, or whose tokens are not
    the grid's stays dense. The authors fine-tune with `mass` 0.4; without training take more.
    Differs: tiles of other shapes, also across frames, and smaller ones at the edges of a grid that
    does not divide. Every row of a batch and every head has its own blocks. Holds nothing.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"mass": 0.9}, {}, {"mass": 0.6})

    mass: float = 0.8
    window: Grid | None = None
    tile: Grid = (1, 8, 8)
    warmup: float = 0.2
    least: int = 2048

    def __post_init__(self) -> None:
        share = is_number(self.mass) and 0 < self.mass <= 1
        check(share, self, "mass", "a number in (0, 1]")
        reach = isinstance(self.window, tuple) and len(self.window) == 3
        reach = reach and all(is_count(each, 0) for each in self.window or ())
        known = "None, or (frames, rows, columns) of whole numbers"
        check(self.window is None or reach, self, "window", known)
        check_sparse(self)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        return attach_sparse(self, denoiser, self._choose)

    def watch(self, denoiser: Denoiser, maps: dict[str, Tensor]) -> Handle:
        """Change nothing, and put each layer's block-wise attention into `maps`.

        Of the layers that would be sparse: shares of the blocks of keys for up to `ROWS` rows of
        blocks, spread evenly, (batch · heads, rows, blocks) by the layer's name.
        """

        def see(call: AttentionCall) -> None:
            shares = block_shares(call.query, call.key, math.prod(self.tile), call.scale)
            every = -(-shares.shape[2] // ROWS)
            maps[call.layer.name] = shares[:, :, ::every].flatten(0, 1)

        return watch_blocks(self, denoiser, see)

    def fitted(self, maps: Sequence[Tensor], share: float) -> NABLA:
        """With the `mass` that keeps a `share` of the key blocks, by maps of `watch`.

        Text, whose blocks are always kept, is not counted.
        """
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            kept = sum(float(smallest_sets(each, middle).float().mean()) for each in maps)
            low, high = (low, middle) if kept > share * len(maps) else (middle, high)
        return replace(self, mass=max(math.floor(low * 1e4), 1) / 1e4)

    def _choose(self, call: AttentionCall, grid: Grid, text: int) -> Tensor:
        size = math.prod(self.tile)
        kept = kept_blocks(call.query, call.key, self.mass, size, call.scale)
        if self.window is not None:
            blocks = math.prod(grid) // size
            places = block_places(grid, self.tile, blocks, kept.device)
            apart = (places[:, None] - places[None]).abs().unbind(-1)
            near = [away <= reach for away, reach in zip(apart, self.window, strict=True)]
            kept[:, :, :blocks, :blocks] |= near[0] & near[1] & near[2]
        return kept


def kept_blocks(
    query: Tensor, key: Tensor, mass: float, size: int, scale: float | None = None
) -> Tensor:
    """Which blocks of `size` keys each block of queries needs, bool (batch, heads, rows, blocks).

    The smallest set of a row whose block-wise attention sums to `mass` or more.
    """
    return smallest_sets(block_shares(query, key, size, scale), mass)


def block_shares(query: Tensor, key: Tensor, size: int, scale: float | None = None) -> Tensor:
    """Softmax attention of blocks' means, (batch, heads, rows, blocks); rows sum to 1."""
    means = repeat_heads(block_means(key, size), query.shape[1])
    scores = block_means(query, size) @ means.mT * softmax_scale(query, scale)
    return scores.softmax(-1)


def smallest_sets(shares: Tensor, mass: float) -> Tensor:
    """For each row the fewest entries that sum to `mass` or more, bool."""
    share, place = shares.sort(dim=-1, descending=True, stable=True)
    before = share.cumsum(-1) - share
    wanted = (before < mass) | (mass == 1)  # sums of shares may round to 1 too early
    kept: Tensor = torch.zeros_like(wanted).scatter(-1, place, wanted)
    return kept

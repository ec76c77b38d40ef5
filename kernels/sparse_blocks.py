"""What all block-sparse attention methods share: tiles, text, warm-up, and where it stays dense."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import pad

from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.geometry import TEXT_FIRST, token_grid
from accel.kernels.block_sparse_attention import block_sparse_attention
from accel.kernels.token_tiles import Grid, sequence_orders, tile_places
from accel.method import Handle, check, is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser

logger = logging.getLogger(__name__)

BLOCKS = (16, 32, 64, 128)


class SparseSettings(Protocol):
    """`tile` (frames, rows, columns) of tokens is a block; `warmup` a share of the steps."""

    @property
    def tile(self) -> Grid:
        """Frames, rows and columns of the tokens of one block."""
        ...

    @property
    def warmup(self) -> float:
        """The first share of the steps, which stays dense."""
        ...

    @property
    def least(self) -> int:
        """Tokens below which a layer stays dense."""
        ...


Choose = Callable[[AttentionCall, Grid, int], "Tensor"]
"""From a call in tile order, the grid and the tokens of text at its end: which blocks of keys each
block of queries keeps, bool (batch or 1, heads or 1, blocks, blocks)."""


def check_sparse(owner: SparseSettings) -> None:
    """Raise `AccelError` for a wrong tile, warm-up or least."""
    sizes = isinstance(owner.tile, tuple) and len(owner.tile) == 3
    sizes = sizes and all(is_count(each, 1) for each in owner.tile)
    blocks = ", ".join(map(str, BLOCKS))
    check(
        sizes and math.prod(owner.tile) in BLOCKS,
        *(owner, "tile", f"(frames, rows, columns) of {blocks} tokens together"),
    )
    share = is_number(owner.warmup) and 0 <= owner.warmup <= 1
    check(share, owner, "warmup", "a share between 0 and 1")
    check(is_count(owner.least, 1), owner, "least", "a whole number ≥ 1")


def attach_sparse(settings: SparseSettings, denoiser: Denoiser, choose: Choose) -> Handle:
    """Let the self-attention of all blocks attend to the blocks that `choose` keeps."""
    name = type(settings).__name__
    sparse = _Sparse(settings, denoiser, choose, name)
    return intercept(denoiser, self_attention(denoiser, name), sparse.attend, sparse.say)


def block_means(tensor: Tensor, size: int) -> Tensor:
    """Mean of each block of tokens in fp32, (batch, heads, blocks, head_dim); the last is short."""
    blocks = pad(tensor.float(), (0, 0, 0, -tensor.shape[2] % size)).unflatten(2, (-1, size))
    means: Tensor = blocks.sum(3) / block_counts(tensor.shape[2], size, blocks)
    return means


def block_counts(tokens: int, size: int, like: Tensor) -> Tensor:
    """Tokens of each block, (blocks, 1)."""
    counts = like.new_full((-(-tokens // size), 1), size)
    counts[-1] = (tokens - 1) % size + 1
    return counts


def block_places(grid: Grid, tile: Grid, blocks: int, device: torch.device) -> Tensor:
    """Mean (frame, row, column) of the tokens of each block of the video, (blocks, 3)."""
    places = tile_places(grid, tile, device).float()
    size = math.prod(tile)
    padded = pad(places, (0, 0, 0, -len(places) % size)).unflatten(0, (-1, size)).sum(1)
    means: Tensor = padded / block_counts(len(places), size, places)
    return means[:blocks]


class _Sparse:
    """One method on one denoiser."""

    def __init__(
        self, settings: SparseSettings, denoiser: Denoiser, choose: Choose, name: str
    ) -> None:
        self.settings, self.denoiser = settings, denoiser
        self.choose, self.name = choose, name
        self.reasons: set[str] = set()
        self.kept: list[Tensor] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """One self-attention, over chosen blocks where the method applies."""
        forward = self.denoiser.forward
        if forward is None or forward.step < self.settings.warmup * forward.total:
            return call.plain()
        grid = token_grid(self.denoiser.module, self.denoiser.family, forward.arguments)
        reason = self._why_not(call, grid)
        if reason is not None:
            if reason not in self.reasons:
                logger.warning("%s: attention stays dense: %s", self.name, reason)
            self.reasons.add(reason)
            return call.plain()
        text = call.query.shape[2] - math.prod(grid)
        first = self.denoiser.family.name in TEXT_FIRST
        device = call.query.device
        order, inverse = sequence_orders(grid, self.settings.tile, text, first, device)
        return self._over_blocks(call, grid, text, order).index_select(2, inverse)

    def _over_blocks(self, call: AttentionCall, grid: Grid, text: int, order: Tensor) -> Tensor:
        """Reorder, choose blocks, attend."""
        size = math.prod(self.settings.tile)
        parts = (call.query, call.key, call.value)
        tiled = call.over(*(each.index_select(2, order) for each in parts))
        mask = self.choose(tiled, grid, text)
        if text:
            words = (tiled.query.shape[2] - text) // size  # the first block that holds text
            mask[:, :, words:] = True
            mask[..., words:] = True
        self.kept.append(mask.float().mean())
        return block_sparse_attention(
            *(tiled.query, tiled.key, tiled.value, mask), block_size=size, scale=call.scale
        )

    def _why_not(self, call: AttentionCall, grid: Grid) -> str | None:
        tokens = call.query.shape[2]
        if call.attn_mask is not None or call.is_causal:
            return "it has a mask"
        if call.key.shape[2] != tokens or math.prod(grid) > tokens:
            return f"{call.query.shape[2]} and {call.key.shape[2]} tokens are not a grid of {grid}"
        if tokens < self.settings.least:
            return f"{tokens} tokens are fewer than {self.settings.least}"
        return None

    def say(self) -> None:
        """The run is over: how much was kept; one device read a run."""
        if self.kept:
            share = float(torch.stack(self.kept).mean())
            logger.info("%s: %.0f %% of the key blocks were kept", self.name, 100 * share)
        self.kept = []

"""NABLA: each head attends to the blocks of keys that hold most of its attention."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.denoiser import Denoiser
from accel.geometry import token_grid
from accel.kernels.attention_inputs import repeat_heads, softmax_scale
from accel.kernels.block_sparse_attention import block_sparse_attention
from accel.kernels.token_tiles import Grid, sequence_orders
from accel.method import Handle, check, is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BLOCKS = (16, 32, 64, 128)
TEXT_FIRST = {"flux", "cogvideox", "qwen_image"}
"""Families whose joint attention puts the text before the picture."""


@dataclass(frozen=True)
class NABLA:
    """Attend to the key blocks that hold a share `mass` of the block-wise attention of each row.

    Mikhailov et al., "∇NABLA: Neighborhood Adaptive Block-Level Attention", 2025. Tokens are put in
    space-time tiles; queries and keys are averaged over each block; softmax of the averages'
    products gives every row of blocks the smallest set of key blocks with at least `mass` of the
    sum; exact attention runs over those blocks. Text tokens of joint attention always attend and
    are always attended to. The first `warmup` share of the steps is dense.

    For self-attention; a layer with fewer than `least` tokens, with a mask, or whose tokens are not
    the grid's stays dense. The authors fine-tune with `mass` 0.4; without training take more.
    Differs: no union with a sliding window, and tiles of other shapes, also across frames, and
    smaller ones at the edges of a grid that does not divide. Every row of a batch and every head
    has its own blocks. Holds nothing.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"mass": 0.9}, {}, {"mass": 0.6})

    mass: float = 0.8
    tile: Grid = (1, 8, 8)
    warmup: float = 0.2
    least: int = 2048

    def __post_init__(self) -> None:
        share = is_number(self.mass) and 0 < self.mass <= 1
        check(share, self, "mass", "a number in (0, 1]")
        sizes = isinstance(self.tile, tuple) and len(self.tile) == 3
        sizes = sizes and all(is_count(each, 1) for each in self.tile)
        blocks = ", ".join(map(str, BLOCKS))
        check(
            sizes and math.prod(self.tile) in BLOCKS,
            *(self, "tile", f"(frames, rows, columns) of {blocks} tokens together"),
        )
        share = is_number(self.warmup) and 0 <= self.warmup <= 1
        check(share, self, "warmup", "a share between 0 and 1")
        check(is_count(self.least, 1), self, "least", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        sparse = _Sparse(self, denoiser)
        layers = self_attention(denoiser, "NABLA")
        return intercept(denoiser, layers, sparse.attend, sparse.say)


def kept_blocks(
    query: Tensor, key: Tensor, mass: float, size: int, scale: float | None = None
) -> Tensor:
    """Which blocks of `size` keys each block of queries needs, bool (batch, heads, rows, blocks).

    The smallest set of a row whose block-wise attention sums to `mass` or more.
    """
    means = repeat_heads(_block_means(key, size), query.shape[1])
    scores = _block_means(query, size) @ means.mT * softmax_scale(query, scale)
    share, place = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = share.cumsum(-1) - share
    wanted = (before < mass) | (mass == 1)  # sums of shares may round to 1 too early
    kept: Tensor = torch.zeros_like(wanted).scatter(-1, place, wanted)
    return kept


def _block_means(tensor: Tensor, size: int) -> Tensor:
    """Mean of each block of tokens in fp32, (batch, heads, blocks, head_dim); the last is short."""
    tokens = tensor.shape[2]
    blocks = pad(tensor.float(), (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
    counts = blocks.new_full((blocks.shape[2], 1), size)
    counts[-1] = (tokens - 1) % size + 1
    means: Tensor = blocks.sum(3) / counts
    return means


class _Sparse:
    """The method on one denoiser."""

    def __init__(self, settings: NABLA, denoiser: Denoiser) -> None:
        self.settings, self.denoiser = settings, denoiser
        self.reasons: set[str] = set()
        self.kept: list[Tensor] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """One self-attention, over chosen blocks where the method applies."""
        forward = self.denoiser.forward
        if forward is None or forward.step < self.settings.warmup * forward.total:
            return call.plain()
        tokens = call.query.shape[2]
        grid = token_grid(self.denoiser.module, self.denoiser.family, forward.arguments)
        reason = self._why_not(call, grid)
        if reason is not None:
            if reason not in self.reasons:
                logger.warning("NABLA: attention stays dense: %s", reason)
            self.reasons.add(reason)
            return call.plain()
        text = tokens - math.prod(grid)
        first = self.denoiser.family.name in TEXT_FIRST
        orders = sequence_orders(grid, self.settings.tile, text, first, call.query.device)
        return self._over_blocks(call, text, *orders)

    def _over_blocks(
        self, call: AttentionCall, text: int, order: Tensor, inverse: Tensor
    ) -> Tensor:
        """Reorder, choose blocks, attend, order back."""
        size = math.prod(self.settings.tile)
        parts = (call.query, call.key, call.value)
        query, key, value = (each.index_select(2, order) for each in parts)
        mask = kept_blocks(query, key, self.settings.mass, size, call.scale)
        if text:
            words = (query.shape[2] - text) // size  # the first block that holds text
            mask[:, :, words:] = True
            mask[..., words:] = True
        self.kept.append(mask.float().mean())
        output = block_sparse_attention(query, key, value, mask, block_size=size, scale=call.scale)
        return output.index_select(2, inverse)

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
            logger.info("NABLA: %.0f %% of the key blocks were kept", 100 * share)
        self.kept = []

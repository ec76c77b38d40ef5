"""Radial attention: the farther apart two frames are, the fewer tokens of one see the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.attention_calls import AttentionCall
from accel.denoiser import Denoiser
from accel.kernels.sparse_blocks import attach_sparse, block_places, check_sparse
from accel.kernels.token_tiles import Grid
from accel.method import Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RadialAttention:
    """A static mask whose windows halve each time the distance in frames doubles.

    Li et al., "Radial Attention", NeurIPS 2025. Frames at most one apart see each other in full. At
    distance d ≥ 2 a token sees those at most w = `decay`·2^⌈tokens⌉ / 2^⌈d⌉ places away, with 2^⌈n⌉
    the power of two above n and `tokens` those of a frame; where w is below a block, only every
    (block/w)-th distance is kept, one block wide. The first frame is seen by all (`sink`). The
    authors take `decay` 0.95 for HunyuanVideo and 0.2 for Wan, and 12 of 50 steps dense.

    Differs: places inside a frame are counted in tile order, so that a window is a compact region,
    and a block is kept by the mean place of its tokens. Text, masks, `tile` and `least` as in
    `NABLA`; a tile must lie in one frame. The same for all heads and rows. Holds nothing.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"decay": 0.95}, {"decay": 0.5}, {})

    decay: float = 0.2
    sink: bool = True
    tile: Grid = (1, 8, 8)
    warmup: float = 0.24
    least: int = 2048

    def __post_init__(self) -> None:
        check(is_number(self.decay) and self.decay > 0, self, "decay", "a number above 0")
        check(isinstance(self.sink, bool), self, "sink", "True or False")
        check_sparse(self)
        check(self.tile[0] == 1, self, "tile", "one frame deep")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        return attach_sparse(self, denoiser, self._choose)

    def _choose(self, call: AttentionCall, grid: Grid, text: int) -> Tensor:
        size, device = math.prod(self.tile), call.query.device
        blocks = -(-call.query.shape[2] // size)
        kept = torch.ones(1, 1, blocks, blocks, dtype=torch.bool, device=device)
        video = math.prod(grid) // size
        kept[0, 0, :video, :video] = radial_blocks(self, grid, video, device)
        return kept


def radial_blocks(
    settings: RadialAttention, grid: Grid, blocks: int, device: torch.device
) -> Tensor:
    """Which of the video's whole blocks see each other, bool (blocks, blocks)."""
    size, tokens = math.prod(settings.tile), grid[1] * grid[2]
    frames = block_places(grid, settings.tile, blocks, device)[:, 0].round()
    inside = (torch.arange(blocks, device=device) + 0.5) * size - frames * tokens
    apart = (frames[:, None] - frames[None]).abs()
    away = (inside[:, None] - inside[None]).abs()
    distances = apart.clamp(min=1)
    window = settings.decay * 2 ** tokens.bit_length() / 2 ** (distances.log2().floor() + 1)
    stride = (size / window).ceil().clamp(min=1)
    narrow = (window < size) & (apart % stride == 0) & (away < size)
    kept: Tensor = (apart <= 1) | ((window >= size) & (away <= window)) | narrow
    if settings.sink:
        kept |= (frames == 0)[None]
    return kept

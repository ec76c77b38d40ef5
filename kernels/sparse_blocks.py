"""What all block-sparse attention methods share: tiles, text, warm-up, and where it stays dense."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import pad

from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.geometry import picture_start
from accel.kernels.block_sparse_attention import block_sparse_attention
from accel.kernels.token_tiles import Grid, sequence_orders, tile_places
from accel.method import AccelError, Handle, check, is_count, is_number

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
"""From a call in tile order, the grid and the tokens of text and reference pictures at its end:
which blocks of keys each block of queries keeps, bool (batch or 1, heads or 1, blocks, blocks)."""


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


def watch_blocks(
    settings: SparseSettings, denoiser: Denoiser, see: Callable[[AttentionCall], None]
) -> Handle:
    """Show `see` the self-attention that would be sparse, in tile order, and leave it as it is."""
    name = type(settings).__name__
    return intercept(
        denoiser, self_attention(denoiser, name), _Watched(settings, denoiser, see, name).attend
    )


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


class _Tiled:
    """Self-attention over tiles of one denoiser, where it can be tiled."""

    def __init__(self, settings: SparseSettings, denoiser: Denoiser, name: str) -> None:
        self.settings, self.denoiser, self.name = settings, denoiser, name
        self.reasons: set[str] = set()

    def tiled(self, call: AttentionCall, grid: Grid) -> tuple[AttentionCall, Tensor] | None:
        """The call in tile order and the way back; None, with a warning, where it is dense."""
        found = self._start(call, grid)
        if isinstance(found, str):
            self._say_dense(found)
            return None
        tokens, device = call.query.shape[2], call.query.device
        order, inverse = sequence_orders(grid, self.settings.tile, found, tokens, device)
        parts = (call.query, call.key, call.value)
        return call.over(*(each.index_select(2, order) for each in parts)), inverse

    def _say_dense(self, reason: str) -> None:
        if reason not in self.reasons:
            logger.warning("%s: attention stays dense: %s", self.name, reason)
        self.reasons.add(reason)

    def grid(self) -> Grid | None:
        """Of the call in flight."""
        forward = self.denoiser.forward
        if forward is None:
            return None
        return self.denoiser.grid(forward.arguments)

    def _start(self, call: AttentionCall, grid: Grid) -> int | str:
        """The first of the tokens that lie on the grid, or why the layer stays dense."""
        tokens = call.query.shape[2]
        if call.attn_mask is not None or call.is_causal:
            return "it has a mask"
        if not call.query.dtype == call.key.dtype == call.value.dtype:
            return "query, key and value have several dtypes"
        if call.query.is_cuda and (call.query.dtype.itemsize > 2 or call.query.shape[3] > 128):
            return "on CUDA it is for float16 and bfloat16, and heads of at most 128"
        if call.key.shape[2] != tokens or math.prod(grid) > tokens:
            return f"{call.query.shape[2]} and {call.key.shape[2]} tokens are not a grid of {grid}"
        if tokens < self.settings.least:
            return f"{tokens} tokens are fewer than {self.settings.least}"
        assert self.denoiser.forward is not None  # it has a grid
        start = picture_start(self.denoiser.family, self.denoiser.forward.arguments, tokens, grid)
        if start is None:
            return "which of its tokens are text is not known"
        return start


class _Watched(_Tiled):
    """Looks on."""

    def __init__(
        self,
        settings: SparseSettings,
        denoiser: Denoiser,
        see: Callable[[AttentionCall], None],
        name: str,
    ) -> None:
        super().__init__(settings, denoiser, name)
        self.see = see

    def attend(self, call: AttentionCall) -> Tensor:
        """One self-attention."""
        grid = self.grid()
        found = None if grid is None else self.tiled(call, grid)
        if found is not None:
            self.see(found[0])
        return call.plain()


class _Sparse(_Tiled):
    """One method on one denoiser."""

    def __init__(
        self, settings: SparseSettings, denoiser: Denoiser, choose: Choose, name: str
    ) -> None:
        super().__init__(settings, denoiser, name)
        self.choose = choose
        self.kept: list[Tensor] = []
        self.broken: str | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """One self-attention, over chosen blocks where the method applies."""
        forward, grid = self.denoiser.forward, self.grid()
        if forward is None or grid is None:
            return call.plain()
        if self.broken or forward.step < self.settings.warmup * forward.total:
            return call.plain()
        found = self.tiled(call, grid)
        if found is None:
            return call.plain()
        tiled, inverse = found
        try:
            return self._over_blocks(tiled, grid).index_select(2, inverse)
        except (AccelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler's or a driver's: no run may die of it
            self.broken = f"{type(error).__name__}: {error}"
            self._say_dense(self.broken)
            return call.plain()

    def _over_blocks(self, tiled: AttentionCall, grid: Grid) -> Tensor:
        """Choose blocks and attend."""
        size, tokens = math.prod(self.settings.tile), tiled.query.shape[2]
        text = tokens - math.prod(grid)  # and reference pictures
        mask = self.choose(tiled, grid, text)
        if text:
            words = (tokens - text) // size  # the first block that holds text
            mask[:, :, words:] = True
            mask[..., words:] = True
        self.kept.append(mask.float().mean())
        return block_sparse_attention(
            *(tiled.query, tiled.key, tiled.value, mask), block_size=size, scale=tiled.scale
        )

    def say(self) -> None:
        """The run is over: how much was kept; one device read a run."""
        if self.kept:
            share = float(torch.stack(self.kept).mean())
            logger.info("%s: %.0f %% of the key blocks were kept", self.name, 100 * share)
        self.kept = []

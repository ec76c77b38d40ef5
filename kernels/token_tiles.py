"""Order of a video's tokens in which 64 neighbours in memory are neighbours in space and time."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int, int]


def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """Places of the tokens, tile after tile and row by row inside a tile, (tokens,) int64.

    `grid` and `tile` are (frames, rows, columns); at the far edges tiles are smaller.
    """
    frames, rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    axes = list(zip((frames, rows, columns), grid, tile, strict=True))
    number, inside = torch.zeros_like(frames), torch.zeros_like(frames)
    for place, length, size in axes:
        number = number * math.ceil(length / size) + place // size
        inside = inside * size + place % size
    return (number * math.prod(tile) + inside).flatten().argsort(stable=True)


@functools.lru_cache(maxsize=16)
def tile_places(grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    """(frame, row, column) of each token in `tile_order`, (tokens, 3)."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    return places[tile_order(grid, tile)].to(device)


@functools.lru_cache(maxsize=16)
def sequence_orders(
    grid: Grid, tile: Grid, start: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(order, inverse) of `tokens`: the video's by tiles, from `start` on, then all others."""
    video = tile_order(grid, tile) + start
    order = torch.cat((video, torch.arange(start), torch.arange(start + len(video), tokens)))
    return order.to(device), order.argsort().to(device)

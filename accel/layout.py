"""Which places of the full-size latent a stage computes, and where in a tensor those places lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from accel.family import Arguments, Family
from accel.geometry import Grid, token_grid

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The live places of a full grid, numbered frame by frame, row by row.

    `pick` (live,) says for each live place one full place, `spread` (full,) for each full place the
    live one that stands for it, so that taking `pick` after `spread` changes nothing. `grid` is the
    live places' own grid; None where they form none. `positions`: "native" gives the live grid the
    coordinates that a picture of its size would have, "spread" those of the middle of the places
    that it stands for.
    """

    full: Grid
    grid: Grid | None
    pick: Tensor = field(repr=False)
    spread: Tensor = field(repr=False)
    positions: str = "native"
    _pixels: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def resized(cls, full: Grid, live: Grid, positions: str = "native") -> Layout:
        """A smaller grid: each full place belongs to the nearest live one."""
        lines = [torch.arange(n) * small // n for n, small in zip(full, live, strict=True)]
        firsts = [-(-torch.arange(small) * n // small) for n, small in zip(full, live, strict=True)]
        return cls(full, live, _flat(firsts, full), _flat(lines, live), positions)

    @classmethod
    def frames(cls, full: Grid, kept: Tensor, source: Tensor) -> Layout:
        """Whole frames: `kept` (live,) are computed; frame i is shown by live frame `source[i]`."""
        live = (len(kept), full[1], full[2])
        line, row = torch.arange(full[1]), torch.arange(full[2])
        pick = _flat([kept, line, row], full)
        return cls(full, live, pick, _flat([source, line, row], live))

    @classmethod
    def mixed(cls, coarse: Layout, chosen: Tensor) -> Layout:
        """`coarse`, with the places in its `chosen` (live,) ones computed one by one.

        The live places are the coarse ones that stay, in order, then the fine ones, those of one
        coarse place one after another.
        """
        if bool(chosen.all()):
            return cls.resized(coarse.full, coarse.full, coarse.positions)
        stay = (~chosen).nonzero().flatten()
        fine = chosen[coarse.spread].nonzero().flatten()
        fine = fine[coarse.spread[fine].sort(stable=True).indices]
        spread = torch.zeros(len(chosen), dtype=torch.long)
        spread[stay] = torch.arange(len(stay))
        spread = spread[coarse.spread]
        spread[fine] = len(stay) + torch.arange(len(fine))
        pick = torch.cat((coarse.pick[stay], fine))
        return cls(coarse.full, None, pick, spread, coarse.positions)

    @property
    def whole(self) -> bool:
        """Whether every place is live."""
        return len(self.pick) == len(self.spread)

    def pixels(self, patch: int) -> tuple[Tensor, Tensor]:
        """`pick` and `spread` of latent pixels, `patch`² to a place, numbered place by place.

        Live places show the picture at their size; a full pixel belongs to the nearest of theirs.
        """
        if patch == 1:
            return self.pick, self.spread
        if patch not in self._pixels:
            token, rows, columns = self._nearest(patch)
            inside = rows[..., :, None] % patch * patch + columns[..., None, :] % patch
            spread = (token * patch**2 + inside).flatten()
            pick = torch.full((len(self.pick) * patch**2,), len(spread))
            pick.scatter_reduce_(0, spread, torch.arange(len(spread)), "amin")
            self._pixels[patch] = pick, spread
        return self._pixels[patch]

    def _nearest(self, patch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each full place's pixels: the live place, (full, patch, patch), and in the picture of
        the live places the row and the column, (full, patch); where they form no grid, within one.
        """
        number = torch.arange(len(self.spread))
        lines = number // self.full[2] % self.full[1], number % self.full[2]
        inner = torch.arange(patch)
        if self.grid is None:
            rows, columns = (self._within(line, patch) for line in lines)
            return self.spread[:, None, None], rows, columns
        full, live = self.full[1:], self.grid[1:]
        rows, columns = (
            (line[:, None] * patch + inner) * small // size
            for line, small, size in zip(lines, live, full, strict=True)
        )
        frames = self.spread // (live[0] * live[1])
        token = (frames[:, None] * live[0] + rows // patch)[:, :, None] * live[1]
        return token + (columns // patch)[:, None, :], rows, columns

    def _within(self, line: Tensor, patch: int) -> Tensor:
        """From each full place's row (or column) those of its pixels in the live place."""
        first = torch.full((len(self.pick),), len(line))
        first = first.scatter_reduce(0, self.spread, line, "amin")
        last = torch.zeros_like(first).scatter_reduce(0, self.spread, line, "amax")
        size = (last - first + 1)[self.spread]
        offset = (line - first[self.spread]) * patch
        return (offset[:, None] + torch.arange(patch)) // size[:, None]

    def parents(self, coarser: Layout, patch: int) -> Tensor:
        """For each live pixel the one of `coarser` that it lies in, (live · patch²,)."""
        return coarser.pixels(patch)[1][self.pixels(patch)[0]]

    def coordinates(self, full: Tensor) -> Tensor:
        """Coordinates of the live places from those of all places, (full, axes)."""
        pick, spread = self.pick.to(full.device), self.spread.to(full.device)
        if self.positions == "spread":
            sums = full.new_zeros(len(pick), full.shape[1]).index_add_(0, spread, full)
            return sums / torch.bincount(spread)[:, None]
        if self.grid is None:
            return full[pick] / 2
        corner = _flat([torch.arange(count) for count in self.grid], self.full)
        return full[corner.to(full.device)]


def _flat(lines: list[Tensor], grid: Grid) -> Tensor:
    frames, rows, columns = lines
    cells = (frames[:, None, None] * grid[1] + rows[None, :, None]) * grid[2] + columns
    return cells.flatten()


@dataclass(frozen=True)
class Form:
    """How a family's latents hold the places: packed tokens, or a grid of latent pixels.

    Packed: (batch, places, channels), a token holding `patch`² latent pixels in its channels.
    Otherwise (batch, channels, [frames,] rows, columns), or frames first.
    """

    packed: bool
    patch: int = 1
    frames_first: bool = False
    flat: bool = False
    """Whether there is no axis of frames."""

    @classmethod
    def of(cls, family: Family, latent: Tensor) -> Form:
        """Of a family's denoiser, called with `latent`."""
        if latent.dim() == 3:
            return cls(packed=True, patch=family.packed)
        return cls(False, frames_first=family.frames_first, flat=latent.dim() == 4)

    def grid(self, module: Any, family: Family, arguments: Arguments) -> Grid:
        """Places of a call's latent: tokens where packed, else latent pixels."""
        if self.packed:
            return token_grid(module, family, arguments)
        shape = arguments.get(family.latent).shape
        frames = 1 if self.flat else shape[1 if self.frames_first else 2]
        return (frames, shape[-2], shape[-1])

    @property
    def axis(self) -> int:
        """The axis of pixels in what `pixels` gives."""
        return 1 if self.packed else 2

    def pixels(self, x: Tensor) -> Tensor:
        """(batch, latent pixels, channels), or (batch, channels, latent pixels) if not packed."""
        if self.packed:
            cells = x.unflatten(2, (-1, self.patch**2))
            return cells.transpose(2, 3).flatten(1, 2)  # type: ignore[no-any-return]
        return (x.transpose(1, 2) if self.frames_first else x).flatten(2)

    def shaped(self, pixels: Tensor, grid: Grid | None) -> Tensor:
        """The inverse of `pixels` for a grid."""
        if self.packed:
            cells = pixels.unflatten(1, (-1, self.patch**2))
            return cells.transpose(2, 3).flatten(2)  # type: ignore[no-any-return]
        assert grid is not None  # only packed tokens may form no grid
        if self.flat:
            return pixels.unflatten(2, grid[1:])  # type: ignore[no-any-return]
        x = pixels.unflatten(2, grid)
        return x.transpose(1, 2) if self.frames_first else x  # type: ignore[no-any-return]

    def take(self, x: Tensor, layout: Layout) -> Tensor:
        """The live part of a full-size tensor."""
        if layout.whole:
            return x
        pick, _ = layout.pixels(self.patch)
        live = self.pixels(x).index_select(self.axis, pick.to(x.device))
        return self.shaped(live, layout.grid)

    def pooled(self, noise: Tensor, layout: Layout) -> Tensor:
        """The live part of full-size white noise: √m times the mean of m pixels, white again."""
        if layout.whole:
            return noise
        pixels = self.pixels(noise)
        pick, spread = (each.to(noise.device) for each in layout.pixels(self.patch))
        shape = list(pixels.shape)
        shape[self.axis] = len(pick)
        sums = pixels.new_zeros(shape).index_add_(self.axis, spread, pixels)
        shape = [1] * sums.dim()
        shape[self.axis] = -1
        counts = torch.bincount(spread).reshape(shape).to(sums)
        return self.shaped(sums / counts.sqrt(), layout.grid)

    def put(self, live: Tensor, layout: Layout) -> Tensor:
        """A full-size tensor that shows the live part: its pixels repeated."""
        if layout.whole:
            return live
        _, spread = layout.pixels(self.patch)
        full = self.pixels(live).index_select(self.axis, spread.to(live.device))
        return self.shaped(full, layout.full)

    def planes(self, x: Tensor, grid: Grid) -> Tensor:
        """(batch, channels, frames, rows, columns) of latent pixels."""
        if not self.packed:
            return self.pixels(x).unflatten(2, grid)  # type: ignore[no-any-return]
        cells = x.unflatten(2, (-1, self.patch, self.patch)).unflatten(1, grid)
        return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # type: ignore[no-any-return]

    def tokens(self, planes: Tensor) -> Tensor:
        """The inverse of `planes`."""
        if not self.packed:
            return self.shaped(planes.flatten(2), (planes.shape[2], *planes.shape[3:]))
        cells = planes.unflatten(4, (-1, self.patch)).unflatten(3, (-1, self.patch))
        return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # type: ignore[no-any-return]

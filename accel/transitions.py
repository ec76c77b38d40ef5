"""Crossing from one size of a noisy latent to another, at the right noise level.

Two rules. T1 resizes the clean estimate and adds noise anew: any resampler, any model. T2 repeats
the elements of the noisy latent itself and adds noise that is correlated within the copies of one
element, so that the sum is white again (as in pyramid flow models, Jin et al. 2024, and RALU,
Jeong et al. 2025). Where the noise is the run's own, T2 takes out what the elements have of it,
repeats them, and puts in what belongs to the copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accel.method import AccelError

if TYPE_CHECKING:
    from torch import Tensor

Weights = tuple[float, float]
"""(a, s) of a latent a·data + s·noise."""


def draw_noise(like: Tensor, shape: Sequence[int], generators: Any) -> Tensor:
    """White noise with `like`'s dtype and device; one generator, one for each row, or None."""
    if isinstance(generators, list | tuple) and len(generators) == 1:
        generators = generators[0]
    if not isinstance(generators, list | tuple):
        return _draw(like, shape, generators)
    rows = [_draw(like, (1, *shape[1:]), generator) for generator in generators]
    return torch.cat(rows)


def _draw(like: Tensor, shape: Sequence[int], generator: Any) -> Tensor:
    device = generator.device if generator is not None else like.device
    noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    return noise.to(like.device, like.dtype)


def renoised(clean: Tensor, noise: Tensor, weights: Weights) -> Tensor:
    """T1: `clean`, resized already, at the noise level of `weights`."""
    signal, level = weights
    return signal * clean + level * noise


def repeated(
    noisy: Tensor, noise: Tensor, parents: Tensor, axis: int, old: Weights, new: Weights
) -> Tensor:
    """T2: element i of the result is a copy of `noisy`'s element `parents[i]`, whitened.

    `noise` is white and has the result's shape. The ratio s/a must grow by √m or more when m copies
    are made; elements with one copy move to the same level.
    """
    share = ((old[1] / old[0]) / (new[1] / new[0])) ** 2
    scaled = (new[0] / old[0]) * noisy.index_select(axis, parents)
    return scaled + new[1] * correlated(noise, parents, axis, share)


def data_in(noisy: Tensor, noise: Tensor, weights: Weights) -> Tensor:
    """What is left of a latent at the level of `weights` without its noise."""
    signal, level = weights
    return (noisy - level * noise) / signal


def correlated(noise: Tensor, parents: Tensor, axis: int, share: float) -> Tensor:
    """Noise whose covariance is I − `share`·Σ, Σ being 1 between copies of one parent.

    Each block of m copies loses 1 − √(1 − m·share) of its mean.
    """
    count = torch.bincount(parents)
    if share * int(count.max()) > 1 + 1e-6:
        raise AccelError(
            f"{int(count.max())} copies of an element need a new noise level whose ratio is at "
            f"least {math.sqrt(int(count.max())):.3g} times the old one, not {share**-0.5:.3g}"
        )
    sums = torch.zeros_like(noise).index_add(axis, parents, noise)
    lost = (1 - (1 - count * share).clamp(min=0).sqrt()) / count.clamp(min=1)
    shape = [1] * noise.dim()
    shape[axis] = -1
    return noise - sums.index_select(axis, parents) * lost[parents].to(noise).reshape(shape)


def resize(planes: Tensor, rows: int, columns: int) -> Tensor:
    """(batch, channels, frames, rows, columns): averaged to a smaller size, cubic to a larger."""
    batch, _, frames, old_rows, old_columns = planes.shape
    if (old_rows, old_columns) == (rows, columns):
        return planes
    flat = planes.transpose(1, 2).flatten(0, 1)
    if rows < old_rows:
        flat = functional.interpolate(flat, (rows, columns), mode="area")
    else:
        flat = functional.interpolate(flat, (rows, columns), mode="bicubic", align_corners=False)
    return flat.unflatten(0, (batch, frames)).transpose(1, 2)  # type: ignore[no-any-return]

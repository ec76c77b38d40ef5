"""The end of a stage: from the latent of one size to that of the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accel.layout import Form, Layout
from accel.method import AccelError
from accel.noise_levels import NoiseLevels
from accel.stages import Stage
from accel.transitions import draw_noise, renoised, repeated, resize

if TYPE_CHECKING:
    from torch import Tensor

    from accel.geometry import Grid
    from accel.staging import StagedRun


@dataclass(frozen=True)
class Crossing:
    """The end of a stage: everything from which the next one starts.

    `clean` is the estimate of the data from the stage's last prediction, `noisy` the latent after
    its last step; both live, in the family's form.
    """

    index: int
    """The number of the stage that begins."""
    levels: NoiseLevels
    before: Stage
    after: Stage
    layout: Layout
    form: Form
    clean: Tensor
    noisy: Tensor
    initial: Tensor
    """The run's first, full-size latent."""
    run: StagedRun

    def grid(self, scale: float) -> Grid:
        """The grid of a stage at `scale`."""
        return self.run.grid(scale)

    def noise(self, places: int) -> Tensor:
        """White noise for so many places, (batch, …), from the call's generators."""
        shape = list(self.form.places(self.noisy).shape)
        shape[self.form.axis] = places
        return draw_noise(self.noisy, shape, self.run.generator)

    def renoise(self, planes: Tensor) -> Tensor:
        """T1: clean latent planes at the next stage's first level, with fresh noise."""
        clean = self.form.tokens(planes)
        noise = self.noise(self.form.places(clean).shape[self.form.axis])
        weights = self.levels.weights(self.after.sigmas[0])
        places = renoised(self.form.places(clean), noise.to(clean.dtype), weights)
        return self.form.shaped(places, _grid_of(planes, self.form))

    def resized(self, positions: str) -> tuple[Layout, Tensor]:
        """T1 with the clean estimate resized to the next stage's size."""
        assert self.layout.grid is not None  # stages of one size are grids
        grid = self.grid(self.after.scale)
        planes = self.form.planes(self.clean, self.layout.grid)
        patch = self.form.patch
        planes = resize(planes, grid[1] * patch, grid[2] * patch)
        return Layout.resized(self.layout.full, grid, positions), self.renoise(planes)

    def repeat(self, layout: Layout) -> Tensor:
        """T2: the noisy latent's elements repeated over the places of `layout`, whitened."""
        places = self.form.places(self.noisy)
        noise = self.noise(len(layout.pick))
        old = self.levels.weights(self.before.sigmas[-1])
        new = self.levels.weights(self.after.sigmas[0])
        parents = layout.parents(self.layout).to(places.device)
        return self.form.shaped(
            repeated(places, noise, parents, self.form.axis, old, new), layout.grid
        )

    def decoded(self, planes: Tensor) -> Tensor:
        """Pixels in [−1, 1] of clean latent planes: (batch, 3, [frames,] height, width)."""
        vae = self._vae()
        mean, std = _statistics(vae, planes)
        latents = planes * std + mean
        self.run.deciding = True
        try:
            return vae.decode(latents[:, :, 0] if _is_flat(vae) else latents)[0]  # type: ignore[no-any-return]
        finally:
            self.run.deciding = False

    def encoded(self, pixels: Tensor) -> Tensor:
        """Clean latent planes of pixels in [−1, 1]; the inverse of `decoded`."""
        vae = self._vae()
        latents = vae.encode(pixels).latent_dist.mode()
        latents = latents[:, :, None] if latents.dim() == 4 else latents
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std  # type: ignore[no-any-return]

    def _vae(self) -> Any:
        vae = getattr(self.run.pipe, "vae", None)
        if vae is None:
            raise AccelError(f"{self.run.name} looks at the decoded estimate: it needs pipe.vae")
        return vae


def _statistics(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """(mean, std) that turn the denoiser's latents into the VAE's."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            torch.tensor(values).to(like)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
    return getattr(config, "shift_factor", None) or 0.0, 1 / config.scaling_factor


def _is_flat(vae: Any) -> bool:
    """Whether a VAE makes pictures, not videos."""
    first = vae.decoder.conv_in
    return isinstance(first, torch.nn.Conv2d)


def _grid_of(planes: Tensor, form: Form) -> Grid:
    return (planes.shape[2], planes.shape[3] // form.patch, planes.shape[4] // form.patch)

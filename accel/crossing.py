"""The end of a stage: from the latent of one size to that of the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accel.layout import Form, Layout
from accel.method import AccelError
from accel.noise_levels import NoiseLevels
from accel.stages import Stage
from accel.transitions import data_in, draw_noise, renoised, repeated, resize

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
    run: StagedRun

    def grid(self, scale: float) -> Grid:
        """The grid of a stage at `scale`."""
        return self.run.grid(scale)

    def noise(self, layout: Layout) -> Tensor:
        """White noise for the live part of `layout`, as `Form.pixels` of a latent.

        The run's own: what its first latent has there; or, where the method asks for fresh noise,
        new draws from the call's generators.
        """
        if self.run.noise == "initial":
            return self.form.pixels(self.form.pooled(self.run.white, layout)).to(self.noisy.dtype)
        shape = list(self.form.pixels(self.noisy).shape)
        shape[self.form.axis] = len(layout.pixels(self.form.patch)[0])
        return draw_noise(self.noisy, shape, self.run.generator)

    def renoise(self, planes: Tensor, layout: Layout) -> Tensor:
        """T1: clean latent planes at the next stage's first level."""
        clean = self.form.pixels(self.form.tokens(planes))
        noise = self.noise(layout).to(clean.dtype)
        weights = self.levels.weights(self.after.sigmas[0])
        return self.form.shaped(renoised(clean, noise, weights), layout.grid)

    def resized(self, positions: str) -> tuple[Layout, Tensor]:
        """T1 with the clean estimate resized to the next stage's size."""
        assert self.layout.grid is not None  # stages of one size are grids
        grid = self.grid(self.after.scale)
        planes = self.form.planes(self.clean, self.layout.grid)
        patch = self.form.patch
        planes = resize(planes, grid[1] * patch, grid[2] * patch)
        layout = Layout.resized(self.layout.full, grid, positions)
        return layout, self.renoise(planes, layout)

    def repeat(self, layout: Layout) -> Tensor:
        """T2: the noisy latent's pixels repeated over those of `layout`."""
        pixels, axis = self.form.pixels(self.noisy), self.form.axis
        noise = self.noise(layout)
        old = self.levels.weights(self.before.sigmas[-1])
        new = self.levels.weights(self.after.sigmas[0])
        parents = layout.parents(self.layout, self.form.patch).to(pixels.device)
        if self.run.noise == "initial":
            data = data_in(pixels, self.noise(self.layout), old).index_select(axis, parents)
            return self.form.shaped(renoised(data, noise, new), layout.grid)
        return self.form.shaped(repeated(pixels, noise, parents, axis, old, new), layout.grid)

    def decoded(self, planes: Tensor) -> Tensor:
        """Pixels in [−1, 1] of clean latent planes: (batch, 3, [frames,] height, width)."""
        vae = self._vae()
        mean, std = _statistics(vae, planes)
        latents = (planes * std + mean).to(vae.dtype)
        self.run.deciding = True
        try:
            pixels: Tensor = vae.decode(latents[:, :, 0] if _is_flat(vae) else latents)[0]
        finally:
            self.run.deciding = False
        return pixels.to(planes.dtype)

    def encoded(self, pixels: Tensor) -> Tensor:
        """Clean latent planes of pixels in [−1, 1]; the inverse of `decoded`."""
        vae = self._vae()
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().to(pixels.dtype)
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

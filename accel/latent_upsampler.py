"""A small network that doubles the rows and columns of a clean latent.

For LSSGen (2025, arXiv 2507.16154); trained for one VAE by `demos/zoo/upsampler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel import trained_folder
from accel.method import AccelError

NAME = "upsampler"
"""Of the two files in an upsampler's folder."""
CLOSE = 0.01
"""Relative difference of fingerprints that a change of dtype may make."""


@dataclass(frozen=True)
class UpsamplerConfig:
    """What an upsampler is for: latent `channels`, and `base`, the `fingerprint` of their VAE."""

    channels: int
    base: tuple[float, ...]
    width: int = 32


def fingerprint(vae: Any) -> tuple[float, ...]:
    """Mean magnitude of the weights behind each output channel of a VAE's encoder.

    The encoder is what makes a latent space; a decoder that was tuned alone keeps it.
    """
    last = _last_weight(vae).detach().float().abs().flatten(1).mean(1)
    return tuple(round(value, 6) for value in last.tolist())


def _last_weight(vae: Any) -> Tensor:
    found: Tensor = [weight for weight in vae.encoder.parameters() if weight.dim() > 2][-1]
    return found


class ResidualBlock(nn.Module):
    """x + conv(SiLU(conv(SiLU(x)))); no norm, so that places far away do not act."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, rows, columns), changed a little."""
        inner = self.first(functional.silu(x))
        return x + self.second(functional.silu(inner))  # type: ignore[no-any-return]


class LatentUpsampler(nn.Module):
    """Two residual blocks, a ×2 block and two more, added to the bilinear resize.

    The last layer starts at zero: untrained, this is the bilinear resize. Differs from the paper:
    narrower (about 90 thousand weights at width 32 instead of 0.55 million) and without norms.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.small = nn.Sequential(
            nn.Conv2d(config.channels, width, 3, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
        )
        self.grow = nn.Conv2d(width, width, 3, padding=1)
        self.large = nn.Sequential(ResidualBlock(width), ResidualBlock(width), nn.SiLU())
        self.last = nn.Conv2d(width, config.channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, planes: Tensor) -> Tensor:
        """(batch, channels, [frames,] rows, columns) to twice the rows and columns.

        Latents are those of the denoiser, mean and deviation taken out. Frames are independent.
        """
        if planes.dim() == 5:
            flat = self(planes.transpose(1, 2).flatten(0, 1))
            return flat.unflatten(0, (len(planes), -1)).transpose(1, 2)  # type: ignore[no-any-return]
        if planes.shape[1] != self.config.channels:
            raise AccelError(
                f"this upsampler is for {self.config.channels} latent channels, not "
                f"{planes.shape[1]}"
            )
        x = planes.to(self.last.weight.dtype)
        inner = functional.interpolate(self.small(x), scale_factor=2.0, mode="nearest")
        added = self.last(self.large(self.grow(inner)))
        base = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return (base + added).to(planes.dtype)  # type: ignore[no-any-return]

    def check(self, vae: Any) -> None:
        """Raise `AccelError` for another VAE; one whose weights are offloaded is not looked at."""
        if _last_weight(vae).is_meta:
            return
        base, found = torch.tensor(self.config.base), torch.tensor(fingerprint(vae))
        if base.shape != found.shape or not torch.allclose(base, found, rtol=CLOSE):
            raise AccelError(
                f"this upsampler, for {self.config.channels} latent channels, was trained for "
                f"another VAE than this {type(vae).__name__}; train one for it as "
                "demos/zoo/upsampler.py does"
            )

    # --- files ---------------------------------------------------------------------------------

    def save(self, folder: Path, notes: dict[str, Any]) -> None:
        """Write weights in half precision and the configuration, with `notes` on the training."""
        trained_folder.save(self, self.config, folder, NAME, notes)

    @classmethod
    def load(cls, folder: Path) -> LatentUpsampler:
        """An upsampler that `save` wrote, in fp32; raises `AccelError` for any other folder."""

        def build(content: dict[str, Any]) -> LatentUpsampler:
            return cls(UpsamplerConfig(**{**content, "base": tuple(content["base"])}))

        maker = "demos/zoo/upsampler.py"
        return trained_folder.load(folder, NAME, build, "latent upsampler", maker)

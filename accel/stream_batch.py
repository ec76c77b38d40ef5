"""Stream batch: several denoising levels of successive frames in one call of the network.

Kodaira et al., "StreamDiffusion", ICCV 2025, §3.1 and §3.2. At every tick a new frame enters at the
noisiest level, every frame in flight moves down one level, and the cleanest one leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from accel.method import AccelError

Guidance = Literal["none", "self", "onetime", "full"]
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0
"""Of `diffusers.LCMScheduler`."""


@dataclass(frozen=True)
class Levels:
    """The noise levels of a stream, (levels, 1, 1, 1) each, from noisy to clean."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    skip: Tensor
    out: Tensor

    @classmethod
    def of(cls, scheduler: Any, timesteps: Sequence[int]) -> Levels:
        """At falling timesteps of a scheduler with `alphas_cumprod`; LCM boundary scalings."""
        kept = getattr(scheduler, "alphas_cumprod", None)
        if kept is None:
            raise AccelError(
                f"{type(scheduler).__name__} is no scheduler of a latent consistency model: a "
                "stream needs one with alphas_cumprod, such as LCMScheduler or DDIMScheduler"
            )
        falling = all(a > b for a, b in itertools.pairwise(timesteps))
        if not timesteps or not falling or not 0 < timesteps[0] < len(kept):
            raise AccelError(
                f"timesteps={tuple(timesteps)}: falling numbers, 1 to {len(kept) - 1}, are accepted"
            )
        chosen = torch.tensor(timesteps)
        share = kept[chosen].float().view(-1, 1, 1, 1)
        scaled = chosen.view(-1, 1, 1, 1) * _TIMESTEP_SCALING
        norm = scaled.square() + _SIGMA_DATA**2
        return cls(
            timesteps=chosen,
            alpha=share.sqrt(),
            sigma=(1 - share).sqrt(),
            skip=_SIGMA_DATA**2 / norm,
            out=scaled / norm.sqrt(),
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: Any, dtype: Any) -> Levels:
        """The same levels where the network computes."""
        parts = (part.to(device, dtype) for part in (self.alpha, self.sigma, self.skip, self.out))
        return Levels(self.timesteps.to(device), *parts)


class StreamBatch:
    """Frames in flight, one a level.

    `network(latents, timesteps, negative)` predicts for rows (rows, channels, height, width) with
    timesteps (rows,); `negative` tells for each row whether the negative prompt conditions it.
    `guidance`: "none"; "self", residual guidance that takes the noise which the input would explain
    for the unconditional prediction; "onetime", which computes the negative prompt once a frame, at
    the noisiest level; "full", at every level. `delta` moderates the residual prediction.
    `together=False` calls the network level by level, for comparison.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Sequence[bool]], Tensor],
        levels: Levels,
        guidance: Guidance = "self",
        scale: float = 1.2,
        delta: float = 1.0,
        velocity: bool = False,
        together: bool = True,
    ) -> None:
        if guidance not in get_args(Guidance):
            raise AccelError(f"guidance={guidance!r}: accepted are {', '.join(get_args(Guidance))}")
        self.network, self.levels = network, levels
        self.guidance = guidance if scale > 1 else "none"
        self.scale, self.delta, self.velocity, self.together = scale, delta, velocity, together
        self.noise: Tensor | None = None
        self.latents: list[Tensor] = []
        """Noisy latents in flight, the newest first."""
        self.places: list[int] = []
        """The level of each at the next call."""
        self.inputs: list[Tensor] = []
        """What explains the noise of each: its clean input, or its estimate from the negative."""

    @property
    def in_flight(self) -> int:
        """Frames that entered and have not left."""
        return len(self.latents)

    def fix_noise(self, like: Tensor, seed: int) -> None:
        """One noise a level for latents (1, channels, height, width), the same for all frames."""
        shape = (len(self.levels), *like.shape[1:])
        noise = torch.randn(shape, generator=Generator().manual_seed(seed))
        self.noise = noise.to(like.device, like.dtype)

    @torch.no_grad()
    def push(self, clean: Tensor) -> Tensor | None:
        """A frame's latent (1, channels, height, width) enters; the one that leaves, or None."""
        assert self.noise is not None  # fix_noise first
        levels = self.levels
        self.latents.insert(0, levels.alpha[:1] * clean + levels.sigma[:1] * self.noise[:1])
        self.inputs.insert(0, clean)
        self.places.insert(0, 0)
        return self._advance()

    @torch.no_grad()
    def advance(self) -> Tensor | None:
        """Frames in flight, if any, move on by one level; the one that leaves, or None."""
        return self._advance() if self.latents else None

    def drain(self) -> Tensor | None:
        """Frames in flight move on without a new one until one leaves; None when none is left."""
        while self.latents:
            left = self.advance()
            if left is not None:
                return left
        return None

    def _advance(self) -> Tensor | None:
        """One call of the network: every frame moves down one level, and the cleanest leaves."""
        levels, noise = self.levels, self.noise
        assert noise is not None  # fix_noise first
        latents = torch.cat(self.latents)
        rows = torch.tensor(self.places, device=latents.device)
        alpha, sigma = levels.alpha[rows], levels.sigma[rows]
        estimate = (latents - sigma * self._guided(latents, rows)) / alpha
        clean = levels.skip[rows] * latents + levels.out[rows] * estimate
        staying = sum(place + 1 < len(levels) for place in self.places)
        below = rows[:staying] + 1
        moved = levels.alpha[below] * clean[:staying] + levels.sigma[below] * noise[below]
        self.latents = [moved[row : row + 1] for row in range(staying)]
        self.inputs, self.places = self.inputs[:staying], below.tolist()
        return clean[-1:] if staying < len(clean) else None

    def _guided(self, latents: Tensor, rows: Tensor) -> Tensor:
        """The guided noise estimate of every row."""
        levels, count = self.levels, len(latents)
        extra = {"full": count, "onetime": int(self.places[0] == 0)}.get(self.guidance, 0)
        every = torch.cat((rows, rows[:extra]))
        batch = torch.cat((latents, latents[:extra]))
        alpha, sigma = levels.alpha[every], levels.sigma[every]
        negative = [False] * count + [True] * extra
        predicted = self._call(batch, levels.timesteps[every], negative)
        noise = alpha * predicted + sigma * batch if self.velocity else predicted
        wanted = noise[:count]
        if self.guidance == "none":
            return wanted
        if self.guidance == "full":
            unwanted = noise[count:]
        else:
            if extra:
                self.inputs[0] = (latents[:1] - sigma[:1] * noise[count:]) / alpha[:1]
            explained = (latents - alpha[:count] * torch.cat(self.inputs)) / sigma[:count]
            unwanted = self.delta * explained
        return unwanted + self.scale * (wanted - unwanted)

    def _call(self, batch: Tensor, timesteps: Tensor, negative: list[bool]) -> Tensor:
        if self.together:
            return self.network(batch, timesteps, negative)
        rows = range(len(batch))
        return torch.cat(
            [self.network(batch[i : i + 1], timesteps[i : i + 1], [negative[i]]) for i in rows]
        )

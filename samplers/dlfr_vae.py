"""DLFR-VAE: still stretches of a clip get fewer latent frames, from the VAE as it was trained."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from accel.hooks import override
from accel.method import AccelError, check, is_count, is_number
from accel.samplers.vgdfr import similarity

Rates = Sequence[tuple[int, float]]
"""(frames, rate) of each chunk in turn; the clip's first frame stands alone and is not in it."""
CALL = 4
"""How many frames AutoencoderKLWan gives its encoder at a time, whatever its factor in time."""


@dataclass(frozen=True)
class DLFRVAE:
    """Dynamic latent frame rate of a Wan VAE (Yuan et al., 2025, arXiv 2502.11897).

    A clip's first frame keeps its own latent frame; the others are taken in chunks of `chunk`
    frames. A chunk's complexity is 1 − the mean SSIM of its adjacent frames: up to the first of
    `thresholds` it gets a quarter of its latent frames, up to the second half of them, above that
    all. Inside the encoder, after its last stage that halves time, each two or four frames of such
    a chunk are averaged; inside the decoder, before its first stage that doubles time, each is
    repeated. A clip of F frames keeps 1 + (F − 1)·(mean rate)/`factor` latent frames.

    `vae` is an `AutoencoderKLWan`. It is changed during a call alone, and makes one call at a
    time; its slicing, tiling and offloading work as ever, but each call of the encoder or decoder
    holds up to four times as many frames. `chunk` is a multiple of four latent frames (16 frames
    for Wan). Negative `thresholds` keep rate 1.

    No code was published: score, thresholds and the two places are this library's reading. The
    causal convolutions run on over changes of the rate; starting them anew there, as at a clip's
    beginning, was worse in a trial on the zoo's VAE.
    """

    vae: Any = field(repr=False)
    thresholds: tuple[float, float] = (0.01, 0.05)
    chunk: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.vae, AutoencoderKLWan):
            raise AccelError(f"DLFRVAE wraps an AutoencoderKLWan, not a {type(self.vae).__name__}")
        if self.factor == 1:
            raise AccelError("DLFRVAE: this AutoencoderKLWan does not compress time")
        limits = self.thresholds
        right = isinstance(limits, tuple) and len(limits) == 2 and all(map(is_number, limits))
        right = right and limits[0] <= limits[1]
        check(right, self, "thresholds", "two numbers, the smaller one first")
        least = 4 * self.factor
        right = is_count(self.chunk, least) and self.chunk % least == 0
        check(right, self, "chunk", f"a multiple of {least} frames")

    @property
    def factor(self) -> int:
        """Frames per latent frame at rate 1."""
        return int(2 ** sum(self.vae.config.temperal_downsample))

    def rates(self, video: Tensor) -> list[tuple[int, float]]:
        """The plan of a clip (batch, 3, frames, height, width); the liveliest sample decides."""
        still, slow = self.thresholds
        plan = []
        for part in video[:, :, 1:].split(self.chunk, 2) if video.shape[2] > 1 else ():
            found = complexity(part)
            plan.append((part.shape[2], 0.25 if found <= still else 0.5 if found <= slow else 1.0))
        return plan

    def encode(
        self, video: Tensor, rates: Rates | None = None
    ) -> tuple[Tensor, list[tuple[int, float]]]:
        """Latents (batch, channels, fewer frames, height, width) and the plan that made them.

        video: (batch, 3, frames, height, width) in [−1, 1], of any number of frames: the last one
        is repeated up to 1 + 4·k. rates: another clip's plan to follow. The latents are the
        distribution's mode, not normalised; at rate 1 those of `vae.encode`, bit for bit.
        """
        if video.dim() != 5 or video.shape[1] != 3 or not video.shape[2]:
            raise AccelError(
                "DLFRVAE.encode needs (batch, 3, frames, height, width), not a tensor of the shape "
                f"{tuple(video.shape)}"
            )
        plan = self.rates(video) if rates is None else [(frames, rate) for frames, rate in rates]
        _check_rates(plan)
        if video.shape[2] != 1 + sum(frames for frames, _ in plan):
            raise AccelError(f"DLFRVAE.encode: {plan} is not a plan for {video.shape[2]} frames")
        last = video[:, :, -1:].expand(-1, -1, -(video.shape[2] - 1) % CALL, -1, -1)
        gathered = _Gathered(_calls(plan))
        with _overridden(
            (self.vae.encoder, gathered.encode),
            (_last_halving(self.vae), gathered.average),
            (self.vae.quant_conv, _unless_empty),
        ):
            latents = self.vae.encode(torch.cat((video, last), 2)).latent_dist.mode()
        return latents, plan

    def decode(self, latents: Tensor, rates: Rates) -> Tensor:
        """The clip (batch, 3, frames, height, width) in [−1, 1], as long as the encoded one.

        latents: (batch, channels, frames, height, width), not normalised; rates: what `encode`
        gave with them, also after a way through JSON, and whatever `chunk` is here.
        """
        _check_rates(rates)
        repeats = _repeats(rates, self.factor)
        if latents.dim() != 5 or latents.shape[2] != len(repeats):
            raise AccelError(
                f"DLFRVAE.decode: these rates make {len(repeats)} latent frames, but the latents "
                f"(batch, channels, frames, height, width) have the shape {tuple(latents.shape)}"
            )
        spread = _Spread(repeats)
        with _overridden(
            (self.vae.decoder, spread.decode),
            (_first_doubling(self.vae), spread.repeat),
        ):
            video: Tensor = self.vae.decode(latents).sample
        return video[:, :, : 1 + sum(frames for frames, _ in rates)]


def complexity(video: Tensor) -> float:
    """1 − mean SSIM of adjacent frames, of the liveliest sample; 0 for a single frame.

    video: (batch, channels, frames, height, width) in [−1, 1].
    """
    frames = video.split(1, 2)
    if len(frames) == 1:
        return 0.0
    return 1 - min(
        mean(similarity(one[[row]], two[[row]]) for one, two in itertools.pairwise(frames))
        for row in range(len(video))
    )


def _calls(rates: Rates) -> list[tuple[int, int]]:
    """For each call of the encoder its frames, and how many latent frames of rate 1 become one.

    Each but a chunk's last makes as many latent frames.
    """
    calls = [(1, 1)]
    for frames, rate in rates:
        every = round(1 / rate)
        whole = -(-frames // CALL) * CALL
        calls += [
            (min(CALL * every, whole - first), every) for first in range(0, whole, CALL * every)
        ]
    return calls


def _repeats(rates: Rates, factor: int) -> list[int]:
    """For each latent frame how many of rate 1 it stands for."""
    repeats = [1]
    for frames, every in _calls(rates)[1:]:
        full = frames // factor
        repeats += [min(every, full - start) for start in range(0, full, every)]
    return repeats


class _Gathered:
    """The encoder: gathers its caller's frames until they are those of a whole call."""

    def __init__(self, calls: list[tuple[int, int]]) -> None:
        self.calls = calls
        self.waiting = iter(calls)
        self.wanted, self.every = calls[0]
        self.parts: list[Tensor] = []
        self.nothing = torch.empty(0)

    def encode(
        self, original: Callable[..., Tensor], x: Tensor, feat_cache: list[Any], **options: Any
    ) -> Tensor:
        """No latent frames yet, or those of the call that is complete now."""
        if _begins(feat_cache):
            self.waiting, self.parts = iter(self.calls), []
            self.wanted, self.every = next(self.waiting)
        self.parts.append(x)
        if sum(part.shape[2] for part in self.parts) < self.wanted:
            return self.nothing
        out = original(torch.cat(self.parts, 2), feat_cache=feat_cache, **options)
        self.nothing, self.parts = out[:, :, :0], []
        self.wanted, self.every = next(self.waiting, (1, 1))
        return out

    def average(self, original: Callable[..., Tensor], x: Tensor, **caches: Any) -> Tensor:
        """After the last stage that halves time."""
        x = original(x, **caches)
        every = min(self.every, x.shape[2])
        return functional.avg_pool3d(x, (every, 1, 1), ceil_mode=True) if every > 1 else x


class _Spread:
    """The decoder: its caller gives it one latent frame at a time."""

    def __init__(self, repeats: list[int]) -> None:
        self.repeats = repeats
        self.waiting = iter(repeats)
        self.times = 1

    def decode(
        self, original: Callable[..., Tensor], x: Tensor, feat_cache: list[Any], **options: Any
    ) -> Tensor:
        """The frames of one latent frame."""
        if _begins(feat_cache):
            self.waiting = iter(self.repeats)
        self.times = next(self.waiting)
        return original(x, feat_cache=feat_cache, **options)

    def repeat(self, original: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        """Before the first stage that doubles time."""
        return original(x.repeat_interleave(self.times, 2), **options)


def _begins(feat_cache: list[Any]) -> bool:
    """Whether a clip, a slice of the batch or a tile begins: no convolution has seen a frame."""
    return all(each is None for each in feat_cache)


def _unless_empty(original: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Tiled encoding applies `quant_conv` after each call, also when nothing came out of it."""
    return original(x) if x.shape[2] else x


def _last_halving(vae: Any) -> Any:
    """The encoder's last layer that halves time: a resampling, or a residual block (Wan 2.2)."""
    halving = [
        layer
        for layer in vae.encoder.down_blocks
        if getattr(getattr(layer, "downsampler", layer), "mode", None) == "downsample3d"
    ]
    return halving[-1]


def _first_doubling(vae: Any) -> Any:
    """Its mirror in the decoder."""
    residual = vae.config.is_residual
    stages = [
        (block, block.upsampler if residual else (block.upsamplers or [None])[0])
        for block in vae.decoder.up_blocks
    ]
    doubling = [
        block if residual else layer
        for block, layer in stages
        if getattr(layer, "mode", None) == "upsample3d"
    ]
    return doubling[0]


def _check_rates(rates: Rates) -> None:
    for number, (frames, rate) in enumerate(rates):
        right = rate in (1, 0.5, 0.25) and is_count(frames, 1)
        if not right or (frames % CALL and number < len(rates) - 1):
            raise AccelError(
                f"DLFRVAE: ({frames!r}, {rate!r}) is not a chunk: it has a number of frames "
                f"(a multiple of {CALL}, but for the last) and a rate of 1, 0.5 or 0.25"
            )


@contextlib.contextmanager
def _overridden(*calls: tuple[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """Calls of these modules go elsewhere; given back at the end, and on exceptions."""
    with contextlib.ExitStack() as undone:
        for module, call in calls:
            undone.callback(override(module, {"__call__": call}))
        yield

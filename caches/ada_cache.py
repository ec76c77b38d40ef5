"""AdaCache: a codebook turns how fast one attention moves into the distance to the next step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count, is_number, is_series
from accel.site import Approximator, Branch, Computed, Policy, Signals, StepContext
from accel.sublayer import Sublayer, cache_sublayers

if TYPE_CHECKING:
    from torch import Tensor

Codebook = tuple[tuple[float, int], ...]
CODEBOOKS: dict[str, Codebook] = {
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2)),
    "slow": ((0.08, 3), (0.16, 2)),
    "100 steps": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (float("inf"), 3)),
}
WINDOW = (0.1, 0.9)
POWER, GRADIENT = 8, 10


def _is_entry(pair: object) -> bool:
    """Whether it is a bound, which may be infinite, and a distance in steps."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    bound, distance = pair
    return (is_number(bound) or bound == math.inf) and bound > 0 and is_count(distance, 1)


@dataclass(frozen=True)
class AdaCache:
    """After a computed step, reuse every layer for as many steps as the codebook says.

    Kahatapitiya et al., "Adaptive Caching for Faster Video Generation", 2024. At each computed step
    d = ‖p_old − p‖₁ / ‖p_old‖₁ / r with p what the first attention from the middle block on gives,
    and r the distance to the computed step before; the next computed step is that of the first
    codebook entry (bound, distance) with d below its bound, else the next one. The first and the
    last two steps are computed. `codebook`: "fast" and "slow" (for about 30 steps), "100 steps", or
    pairs.

    `motion`: MoReg, which multiplies d by the video's motion m = (raw / `motion_norm`)⁸ + |10 Δm/r|
    in the middle 80 % of the steps, raw being ‖difference of neighbouring frames‖₁ over the sum of
    both norms. The default norm is the authors' for Open-Sora; it belongs to the model.

    Differs from the authors' code: outputs are taken before the gate, which stays live. Adaptive:
    host transfers at computed steps only; rows of a batch decide together. Holds one tensor a
    sublayer and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"codebook": "slow"},
        {"codebook": "fast"},
        {"codebook": "100 steps"},
    )

    codebook: str | Codebook = "fast"
    motion: bool = False
    motion_norm: float = 0.385
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        if isinstance(self.codebook, str):
            names = ", ".join(f'"{name}"' for name in CODEBOOKS)
            check(self.codebook in CODEBOOKS, self, "codebook", f"{names} or pairs")
        else:
            accepted = "pairs of a bound above 0 and a distance in steps"
            check(is_series(self.codebook, _is_entry, least=0), self, "codebook", accepted)
        check(isinstance(self.motion, bool), self, "motion", "True or False")
        check(is_number(self.motion_norm) and self.motion_norm > 0, self, "motion_norm", "> 0")

    @property
    def entries(self) -> Codebook:
        """The codebook's pairs."""
        return CODEBOOKS[self.codebook] if isinstance(self.codebook, str) else self.codebook

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""

        def policies(_: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            rate, watched = _Rate(self), observer(layers)
            return [_Layer(rate, n == watched) for n in range(len(layers))]

        return cache_sublayers(denoiser, policies, self.reuse, "AdaCache")


def observer(layers: Sequence[Sublayer]) -> int:
    """The number of the first attention from the middle block on, or else of the last block's.

    Single-stream blocks, of which the second half of FLUX is made, have none by itself.
    """
    attention = [n for n, layer in enumerate(layers) if layer.kind in ("self", "temporal")]
    middle = layers[-1].block // 2
    last = max(attention, key=lambda n: layers[n].block, default=0)
    return next((n for n in attention if layers[n].block >= middle), last)


class _Rate:
    """The next computed step of one branch."""

    def __init__(self, settings: AdaCache) -> None:
        self.settings = settings
        self.next = self.asked = 0
        self.last: int | None = None
        self.skipping = False
        self.seen: Tensor | None = None
        self.motion: float | None = None

    def skip(self, context: StepContext) -> bool:
        """One verdict a step, however often it is asked."""
        if context.step != self.asked or context.step == 0:
            self.asked = context.step
            ends = context.step == 0 or context.step >= context.total - 2
            self.skipping = not ends and context.step < self.next
        return self.skipping

    def observe(self, context: StepContext, signals: Signals, new: Tensor) -> None:
        """The observer was computed."""
        old, rate = self.seen, context.step - (self.last or 0)
        self.seen, self.last, self.next = new, context.step, context.step + 1
        if old is None or rate < 1:
            return
        distance = signals.mean_change(new, old, old) / rate
        if self.settings.motion:
            distance *= self._motion(context, signals, new, rate)
        fitting = (steps for bound, steps in self.settings.entries if distance < bound)
        self.next = context.step + next(fitting, 1)

    def _motion(self, context: StepContext, signals: Signals, features: Tensor, rate: int) -> float:
        if not WINDOW[0] <= context.step / context.total <= WINDOW[1]:
            return 1.0
        frames = _by_frame(features, signals.grid or (1, 1, 1))
        later, earlier = frames[:, 1:], frames[:, :-1]
        raw = signals.mean_change(later, earlier, later.abs() + earlier.abs())
        motion = (raw / self.settings.motion_norm) ** POWER
        before = motion if self.motion is None else self.motion
        self.motion = motion
        return motion + abs(GRADIENT * (motion - before) / rate)


class _Layer:
    """Follows the branch's verdict; the observer makes it."""

    def __init__(self, rate: _Rate, observes: bool) -> None:
        self.rate, self.observes = rate, observes

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self.rate.skip(context)

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        if self.observes and site.outputs[0] is not None:
            self.rate.observe(context, signals, site.outputs[0])


def _by_frame(features: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(rows, frames, …): from all tokens of a video, or from a temporal layer's."""
    frames, tokens = grid[0], math.prod(grid)
    if frames > 1 and features.shape[1] == tokens:
        return features.reshape(len(features), frames, -1)
    if frames > 1 and features.shape[1] == frames:
        return features
    if frames > 1 and features.shape[1] * frames == tokens:
        return features.reshape(-1, frames, *features.shape[1:])
    raise AccelError("AdaCache(motion=True) needs a video of at least two latent frames")

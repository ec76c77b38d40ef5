"""SeaCache: TeaCache's rule on the part of the input that is signal and not noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_number
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SeaCache:
    """Skip while the summed change of the filtered block input stays below `threshold`.

    "SeaCache", CVPR 2026. The input of block 0 is filtered over its token grid, frame by frame,
    with the Wiener gain G(f) = S(f) / (S(f) + (b/a)²) of a latent a·data + b·noise, where
    S(f) = |f|^−`falloff` is the power of natural images, f in cycles per picture, and G has unit
    mean. Then as in TeaCache, without a polynomial: the relative change of the filtered input to
    the step before is summed, and the stack skipped while the sum is below `threshold`. The first
    and the last step are computed.

    **Reconstructed** from the paper's description: no code was public. Adaptive: one host transfer
    a step and branch, one FFT of the block input; rows of a batch decide together.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.4},
    )

    threshold: float = 0.2
    falloff: float = 2.0
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_number(self.falloff) and self.falloff >= 0, self, "falloff", "a number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole block chain."""

        def policy(_: Branch) -> _Filtered:
            return _Filtered(self)

        return denoiser.cache(policy, self.reuse, method="SeaCache")


class _Filtered:
    def __init__(self, settings: SeaCache) -> None:
        self.settings = settings
        self.observed: Tensor | None = None
        self.total = 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if self.settings.threshold == 0:
            return False
        previous, self.observed = self.observed, self._filter(signals.maps, context.log_snr)
        if previous is None or context.step == 0 or context.last:
            return False
        self.total += signals.relative_change(self.observed, previous)
        return self.total < self.settings.threshold

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.total = 0.0

    def _filter(self, maps: Tensor, log_snr: float) -> Tensor:
        rows, columns = maps.shape[-2:]
        vertical = torch.fft.fftfreq(rows, 1 / rows, device=maps.device)
        horizontal = torch.fft.rfftfreq(columns, 1 / columns, device=maps.device)
        radius = (vertical[:, None] ** 2 + horizontal[None, :] ** 2).sqrt().clamp(min=1.0)
        power = radius**-self.settings.falloff
        gain = power / (power + math.exp(-2 * min(max(log_snr, -9.0), 9.0)))
        gain = gain / gain.mean()
        spectrum = torch.fft.rfft2(maps.float())
        filtered: Tensor = torch.fft.irfft2(spectrum * gain, s=(rows, columns))
        return filtered

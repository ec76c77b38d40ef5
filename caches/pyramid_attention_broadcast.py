"""Pyramid Attention Broadcast: the less an attention varies, the longer its output is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count, is_number, is_series
from accel.site import Approximator, Computed, Signals, StepContext
from accel.sublayer import cache_sublayers


@dataclass(frozen=True)
class PyramidAttentionBroadcast:
    """Inside a window of timesteps compute each kind of attention every few steps only.

    Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast" (PAB), ICLR 2025.
    `spatial` (also joint attention), `temporal` and `cross` are the ranges: 2 computes every second
    step. `window`: timesteps of 1000 between which outputs are reused. `mlp_blocks`: blocks whose
    MLP is reused with the range `mlp` (none by default, as in diffusers). The MLP's list of
    timesteps in the authors' code is replaced by the same window. Static: rows of a batch are
    independent. Holds one tensor an attention and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"spatial": 3, "cross": 6},
        {"spatial": 4, "cross": 8, "window": (50, 950)},
    )

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    window: tuple[float, float] = (100, 800)
    mlp: int = 2
    mlp_blocks: tuple[int, ...] = ()
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        for field in ("spatial", "temporal", "cross", "mlp"):
            check(is_count(getattr(self, field), 1), self, field, "a whole number ≥ 1")
        pair = is_series(self.window, is_number) and len(self.window) == 2
        check(pair and self.window[0] < self.window[1], self, "window", "(low, high) timesteps")
        if not is_series(self.mlp_blocks, lambda block: is_count(block, 0), least=0):
            raise AccelError("PyramidAttentionBroadcast(mlp_blocks=…): block numbers from 0 on")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention layer, and to the MLPs of `mlp_blocks`."""
        ranges = {"self": self.spatial, "temporal": self.temporal, "cross": self.cross}
        return cache_sublayers(
            denoiser,
            lambda _, layers: [
                _Broadcast(
                    self.window,
                    ranges.get(layer.kind, self.mlp if layer.block in self.mlp_blocks else 1),
                )
                for layer in layers
            ],
            self.reuse,
            "PyramidAttentionBroadcast",
            ("self", "temporal", "cross", *(("mlp",) if self.mlp_blocks else ())),
        )


class _Broadcast:
    """Computes one step in `reach` within the window."""

    def __init__(self, window: tuple[float, float], reach: int) -> None:
        self.window, self.reach = window, reach

    def skip(self, context: StepContext, signals: Signals) -> bool:
        low, high = self.window
        return low < context.timestep < high and context.skipped < self.reach - 1

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass

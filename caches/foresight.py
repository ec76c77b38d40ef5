"""Foresight: each block is reused while it changes no more than it did when warming up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Foresight:
    """Reuse a block's output while its mean squared change stays ≤ `gamma` · λ.

    Adnan et al., "Foresight", NeurIPS 2025. λ is the block's mean squared change between steps at
    the end of the first `warmup` share of the steps, which are computed. Afterwards every
    `interval`-th step computes all blocks and measures their change anew; on the others a block is
    reused as said. λ is that of the last pair of warm-up steps, as in the released code; blocks are
    decided one by one as in the paper, where the code reuses everything up to the deepest block.

    Adaptive: one host transfer a computed block; rows of a batch decide together. Holds one output
    a block and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"gamma": 0.5},
        {"gamma": 1.0},
        {"gamma": 2.0},
    )

    gamma: float = 1.0
    interval: int = 2
    warmup: float = 0.15
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.gamma) and self.gamma >= 0, self, "gamma", "a number ≥ 0")
        check(is_count(self.interval, 2), self, "interval", "a whole number ≥ 2")
        warmup = is_number(self.warmup) and 0 <= self.warmup <= 1
        check(warmup, self, "warmup", "a share between 0 and 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every block of the chain."""

        def policy(_: Branch) -> _Change:
            return _Change(self)

        add = partial(denoiser.cache, policy, self.reuse, method="Foresight", keeps_output=True)
        count = len(denoiser.chain.blocks)
        return Handle.together([add(start=b, stop=b + 1) for b in range(count)] or [add()])


class _Change:
    """The rule of one block and branch."""

    def __init__(self, settings: Foresight) -> None:
        self.settings = settings
        self.output: Tensor | None = None
        self.limit: float | None = None
        self.change = 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        past = context.step - self._warm(context)
        if past < 0 or (past + 1) % self.settings.interval == 0 or self.limit is None:
            return False
        return self.change <= self.settings.gamma * self.limit and self.settings.gamma > 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        new = site.outputs[0]
        if self.output is not None and new is not None:
            square = (new.float() - self.output.float()).square()
            self.change = signals.mean_change(square, square.new_zeros(()))
            if context.step < self._warm(context) or self.limit is None:
                self.limit = self.change
        self.output = new

    def _warm(self, context: StepContext) -> int:
        return max(round(self.settings.warmup * context.total), 2)

"""ERTACache: a fixed schedule from measured reuse errors, and reuse corrected by a linear model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count, is_number, is_series
from accel.site import Branch, Computed, Signals, StepContext, Streams

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ERTACache:
    """Reuse residuals along a schedule made from their measured errors, scaled as they were.

    "ERTACache: Error Rectification and Timesteps Adjustment", 2025. **Reconstructed** from its
    short description: one run is measured; with R(i) a residual of the whole stack,
    the reuse of R(j) at step i is corrected by the least-squares factor
    s = ⟨R(i), R(j)⟩ / ‖R(j)‖² and errs by ‖R(i) − s·R(j)‖² / ‖R(i)‖². From a computed step as many
    steps reuse it as keep the summed root of that error ≤ `threshold`, at most `longest`. The
    paper's adjustment of the timesteps is not built: pipelines own their timesteps.

    `scales`: for each step of the schedule the factor, 0 where to compute. None: the first run is
    computed and measured, one host transfer a step, holding `longest` + 1 residuals. Static: rows
    of a batch are independent. Holds one residual a branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.4},
    )

    threshold: float = 0.2
    longest: int = 6
    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_count(self.longest, 0), self, "longest", "a whole number ≥ 0")
        right = self.scales is None or (is_series(self.scales, is_number) and self.scales[0] == 0)
        if not right:
            raise AccelError("ERTACache(scales=…): one factor a step, 0 to compute, the first 0")

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return self.scales is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        found, measured = list(self.scales or ()), _Errors(self.longest)

        def settle() -> None:
            if not found and measured.run == denoiser.clock.completed and measured.rows:
                found.extend(measured.scales(self.threshold))

        def policy(branch: Branch) -> _Scaled | _Errors:
            settle()
            if found:
                return _Scaled(found)
            return measured.begin(denoiser.clock.run) if branch.ordinal == 0 else _Errors(0)

        def settled() -> ERTACache:
            settle()
            return replace(self, scales=tuple(found) or None)

        if not found:
            logger.info("ERTACache: no scales known; the first run is computed and measured")
        handle = denoiser.cache_widest(policy, HoldResidual(), "ERTACache")
        forgetting = denoiser.when_forgetting(lambda: measured.past.clear())
        return Handle.together([handle, forgetting]).settling(settled)


class _Scaled:
    """The schedule; a reused residual is scaled."""

    def __init__(self, scales: Sequence[float]) -> None:
        self.scales_at = scales

    def _scale(self, context: StepContext) -> float:
        return self.scales_at[context.place * len(self.scales_at) // context.schedule]

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self._scale(context) != 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass

    def refine(
        self, context: StepContext, signals: Signals, forecast: Streams, compute: Any
    ) -> Streams:
        scale = self._scale(context)
        return tuple(None if each is None else each * scale for each in forecast)


class _Errors:
    """Skips nothing; for each step the factor and error of reusing each of the steps before."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.begin(-1)

    def begin(self, run: int) -> _Errors:
        self.run, self.total = run, 0
        self.past: list[Tensor] = []
        self.rows: dict[int, list[tuple[float, float]]] = {}
        """By place: (factor, error) of reusing the residual one, two, … steps old."""
        return self

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        import torch

        if self.longest == 0 or site.kept[0] is None:
            return
        new = site.kept[0].float().flatten()
        size = new @ new
        pairs = [torch.stack((new @ old, old @ old, size)) for old in reversed(self.past)]
        row = []
        for product, old, own in torch.stack(pairs).tolist() if pairs else []:
            scale = product / max(old, 1e-12)
            row.append((scale, max(own - scale * product, 0.0) / max(own, 1e-12)))
        self.rows[context.place], self.total = row, context.schedule
        self.past = [*self.past, new][-self.longest :]

    def scales(self, threshold: float) -> list[float]:
        """The schedule that a greedy walk finds."""
        found = [0.0] * self.total
        age, error = 0, 0.0
        for place, row in sorted(self.rows.items()):
            age += 1
            if age > len(row) or place == self.total - 1 or threshold == 0:
                age, error = 0, 0.0
                continue
            scale, squared = row[age - 1]
            error += squared**0.5
            if error > threshold or scale == 0:
                age, error = 0, 0.0
            else:
                found[place] = scale
        return found

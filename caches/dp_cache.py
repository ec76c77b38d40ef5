"""DPCache: the best fixed schedule for a budget, by dynamic programming over one full run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.caches.products import Compute, Products, scheduled
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_number, is_schedule
from accel.optimal_steps import best_steps, forecast_costs
from accel.site import Approximator, Branch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DPCache:
    """Compute a `share` of the steps: those from which all others are forecast best.

    "DPCache", CVPR 2026; with `objective` "max" LeMiCa's minimax path. The first run is computed in
    full; the products of its residuals give the squared error of every forecast from every pair
    of steps, relative to the residual, without another run. Dynamic programming over pairs then
    finds the steps with the least sum ("sum") or the least maximum ("max") of errors.

    `schedule`: ones (compute) and zeros, when known; scaled to other step counts. The forecast that
    is optimised is the line through the last two computed residuals, or the last one alone with
    `HoldResidual`; other approximators run on the line's schedule. Differs from the papers: one run
    instead of dozens, the first branch's residuals alone, and no code was public to compare with.
    `whole` skips whole calls of the denoiser (see `PlainCycle`). Static: rows of a batch are
    independent. The measuring run holds one residual for each step.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"share": 0.5},
        {"share": 0.3},
        {"share": 0.2},
        {"share": 0.15},
        {"share": 0.12},
        {"share": 0.1},
        {"share": 0.3, "whole": True},
        {"share": 0.2, "whole": True},
        {"share": 0.15, "whole": True},
        {"share": 0.12, "whole": True},
        {"share": 0.1, "whole": True},
    )

    share: float = 0.3
    objective: str = "sum"
    schedule: tuple[int, ...] | None = None
    reuse: Approximator = Newton(1)
    whole: bool = False

    def __post_init__(self) -> None:
        check(is_number(self.share) and 0 < self.share <= 1, self, "share", "in (0, 1]")
        check(isinstance(self.whole, bool), self, "whole", "True or False")
        check(self.objective in ("sum", "max"), self, "objective", '"sum" or "max"')
        if self.schedule is not None and not is_schedule(self.schedule):
            raise AccelError("DPCache(schedule=…): 0s and 1s, the first of them a 1")

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return self.schedule is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        found, products = list(self.schedule or ()), Products()

        def settle() -> None:
            if not found and products.run == denoiser.clock.completed and len(products.places) > 1:
                line = not isinstance(self.reuse, HoldResidual)
                costs = forecast_costs(products.gram.matrix(), line)
                computes = max(round(self.share * len(costs)), 2)
                steps = best_steps(costs, computes, self.objective == "max")
                found.extend(scheduled(products.total, products.places, steps))

        def policy(branch: Branch) -> Table | Products | Compute:
            settle()
            if found:
                return Table(tuple(found))
            return products.begin(denoiser.clock.run) if branch.ordinal == 0 else Compute()

        def settled() -> DPCache:
            settle()
            return replace(self, schedule=tuple(found) or None)

        if not found:
            logger.info("DPCache: no schedule known; the first run is computed and measured")
        handle = denoiser.cache_widest(policy, self.reuse, "DPCache", self.whole)
        forgetting = denoiser.when_forgetting(products.release)
        return Handle.together([handle, forgetting]).settling(settled)

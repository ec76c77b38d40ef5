"""Block Caching: every block has its own schedule, from how fast it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.caches.block_adjustment import Adjustment
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_number
from accel.site import Approximator, Branch, Computed, Signals, StepContext, Streams

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockCaching:
    """Reuse a block's residual until its summed change since the last computation exceeds δ.

    Wimbauer et al., "Cache Me if You Can", CVPR 2024. With C(i) a block's residual at step i, the
    change is D(i) = ‖C(i) − C(i−1)‖₁ / ‖C(i)‖₁; a block is reused while the sum of D since it was
    computed stays ≤ `threshold`.

    `changes`: D for each block (or one row for all) and step, the first of a row being 0. None: the
    first run is computed in full and measured, with one host transfer a block; the branches' mean
    is taken. A run of another length takes the nearest entry times the ratio of the lengths [ours].
    Static: rows of a batch are independent. Holds one residual a block and branch. On U-Nets the
    attention layers are cached, as in the paper.

    `adjustment`: a safetensors file with a scale and shift of every reused residual's channels (see
    `accel.caches.block_adjustment`). While it is not there, runs after the measuring one compute
    everything and fit it; give that run a batch of prompts. It holds for one step count.
    """

    slot: ClassVar[str] = "stack"
    files: ClassVar[tuple[str, ...]] = ("adjustment",)
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.4},
    )

    threshold: float = 0.2
    changes: tuple[tuple[float, ...], ...] | None = None
    reuse: Approximator = HoldResidual()
    adjustment: str = ""

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        for row in self.changes or ():
            if len(row) < 2 or not all(is_number(value) and value >= 0 for value in row):
                raise AccelError(
                    "BlockCaching(changes=…): each row needs at least two numbers ≥ 0, one a step"
                )

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return not self.changes

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every block of the chain that keeps its input's shape."""
        chain = denoiser.chain
        blocks = [index for index in range(len(chain.blocks)) if chain.keeps_shape(index)]
        count = len(blocks)
        if self.changes is not None and len(self.changes) not in (1, count):
            raise AccelError(
                f"BlockCaching(changes=…): {len(self.changes)} rows for the {count} blocks of "
                f"{type(denoiser.module).__name__}"
            )
        table, measured = list(self.changes or ()), _Measurement()
        model = type(denoiser.module).__name__
        adjustment = (
            Adjustment(Path(self.adjustment), model, denoiser.name) if self.adjustment else None
        )

        def settle() -> None:
            if not table and measured.whole(denoiser.clock.completed):
                table.extend(measured.table(count))

        def policy(row: int, branch: Branch) -> _Accumulate | _Watch:
            settle()
            if not table:
                return measured.watch(row, denoiser.clock.run)
            changes = table[row if len(table) > 1 else 0]
            if adjustment is None:
                return _Accumulate(self.threshold, changes)
            adjustment.begin(denoiser.clock.run)
            return _Adjusted(self.threshold, changes, adjustment, row)

        def settled() -> BlockCaching:
            settle()
            return replace(self, changes=tuple(table) or None)

        if not table:
            logger.info("BlockCaching: no changes known; the first run is computed and measured")
        handles = [
            denoiser.cache(partial(policy, row), self.reuse, block, block + 1, "BlockCaching")
            for row, block in enumerate(blocks)
        ] or [denoiser.cache(partial(policy, 0), self.reuse, method="BlockCaching")]
        if adjustment is not None:
            fitted = adjustment
            ending = denoiser.when_forgetting(lambda: fitted.end(denoiser.clock.completed))
            handles.append(ending)
        return Handle.together(handles).settling(settled)


class _Accumulate:
    """The schedule of one block and branch."""

    def __init__(self, threshold: float, changes: tuple[float, ...]) -> None:
        self.threshold, self.changes, self.sum = threshold, changes, 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        count = len(self.changes)
        place = round(context.place * (count - 1) / max(context.schedule - 1, 1))
        self.sum += self.changes[place] * count / context.schedule
        return self.threshold > 0 and self.sum <= self.threshold

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.sum = 0.0


class _Adjusted(_Accumulate):
    """The schedule of one block and branch whose reused residuals are scaled and shifted."""

    def __init__(
        self, threshold: float, changes: tuple[float, ...], adjustment: Adjustment, row: int
    ) -> None:
        super().__init__(threshold, changes)
        self.adjustment, self.row = adjustment, row

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        """The adjusted residual; while the adjustment is fitted, the block is computed too."""
        reused, *others = forecast
        if reused is None:
            return forecast
        key = self.adjustment.key(self.row, context)
        if self.adjustment.fitting:
            computed = compute()[0]
            assert computed is not None  # the stream that is reused
            self.adjustment.fit(key, reused, computed - signals.hidden)
        return (self.adjustment.adjusted(key, reused), *others)


@dataclass
class _Measurement:
    """The changes of all blocks in one run, over all branches."""

    run: int = -1
    schedule: int = 0
    found: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def watch(self, block: int, run: int) -> _Watch:
        if run != self.run:
            self.run, self.found = run, {}
        return _Watch(self, block)

    def whole(self, completed: int) -> bool:
        """Whether the run that was measured ended as it should."""
        return bool(self.found) and self.run == completed

    def table(self, blocks: int) -> tuple[tuple[float, ...], ...]:
        """One row a block; a step that was not measured takes the nearest one that was."""
        rows = []
        for block in range(blocks):
            known = {place: fmean(v) for (b, place), v in self.found.items() if b == block}
            if not known:
                return ()
            nearest = (min(known, key=lambda k: abs(k - i)) for i in range(1, self.schedule))
            rows.append((0.0, *(known[place] for place in nearest)))
        return tuple(rows)


class _Watch:
    def __init__(self, measurement: _Measurement, block: int) -> None:
        self.measurement, self.block = measurement, block
        self.last: Tensor | None = None

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        new = site.kept[0]
        if self.last is not None and new is not None:
            change = signals.mean_change(new, self.last, new)
            self.measurement.schedule = context.schedule
            place = (self.block, context.place)
            self.measurement.found.setdefault(place, []).append(change)
        self.last = new

"""Block-wise Adaptive Caching: every sublayer has its own optimal refresh steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from accel.caches.approximators import HoldResidual
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count, is_number, is_schedule, is_series
from accel.site import Approximator, Branch, Computed, Policy, Signals, StepContext
from accel.sublayer import Sublayer, cache_sublayers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

logger = logging.getLogger(__name__)

SAMPLES = 4096
"""Values of an output that the measurement looks at."""


@dataclass(frozen=True)
class BAC:
    """Refresh each attention and MLP output at the steps that keep it most similar to itself.

    Ji et al., "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026. For each
    sublayer dynamic programming chooses `share` of the steps, the first among them, such that the
    summed cosine similarity of the reused output with what it stands in for is greatest
    (`adjacent`: of neighbouring steps, as printed in the paper, where the sum telescopes). Then the
    `upstream` sublayers of largest error are also refreshed whenever an MLP of the same or a
    deeper block is (the bubbling union), because MLPs amplify errors of what feeds them.

    `schedules`: ones (compute) and zeros for each sublayer. None: the first run is computed, and a
    sample of the first branch's outputs compared. Static: rows of a batch are independent. Holds
    one tensor a sublayer and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"share": 0.5}, {"share": 0.3}, {"share": 0.2})

    share: float = 0.3
    upstream: int = 3
    adjacent: bool = False
    schedules: tuple[tuple[int, ...], ...] | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.share) and 0 < self.share <= 1, self, "share", "in (0, 1]")
        check(is_count(self.upstream, 0), self, "upstream", "a whole number ≥ 0")
        check(isinstance(self.adjacent, bool), self, "adjacent", "True or False")
        if self.schedules is not None and not is_series(self.schedules, is_schedule, least=0):
            raise AccelError("BAC(schedules=…): rows of 0s and 1s, the first of them a 1")

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return not self.schedules

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""
        rows, measured = list(self.schedules or ()), _Measurement()

        def settle() -> None:
            if not rows and measured.run == denoiser.clock.completed and measured.samples:
                rows.extend(measured.schedules(self))
                measured.samples.clear()

        def policies(branch: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            settle()
            if rows and len(rows) not in (1, len(layers)):
                raise AccelError(
                    f"BAC(schedules=…): {len(rows)} rows for the {len(layers)} layers of "
                    f"{type(denoiser.module).__name__}"
                )
            if rows:
                return [Table(rows[n % len(rows)]) for n in range(len(layers))]
            if branch.ordinal == 0:
                measured.begin(denoiser.clock.run, layers)
            watched = branch.ordinal == 0
            return [_Watch(measured, n if watched else None) for n in range(len(layers))]

        def settled() -> BAC:
            settle()
            return replace(self, schedules=tuple(rows) or None)

        if not rows:
            logger.info("BAC: no schedules known; the first run is computed and measured")
        return cache_sublayers(denoiser, policies, self.reuse, "BAC").settling(settled)


def best_refreshes(similarity: Matrix, refreshes: int, adjacent: bool = False) -> list[int]:
    """The `refreshes` steps, 0 among them, with the greatest similarity kept between them.

    `similarity`: (steps, steps). A segment from i to before j keeps Σ similarity(i, k) of its
    reused steps k, or with `adjacent` Σ similarity(k − 1, k).
    """
    count = len(similarity)
    if adjacent:
        similarity = np.tile(np.append([0.0], np.diagonal(similarity, 1)), (count, 1))
    sums = np.cumsum(np.triu(similarity, 1), axis=1)
    kept = np.full((count, count + 1), -np.inf)  # kept[i, j]: refresh at i, next one at j
    for i in range(count):
        kept[i, i + 1 :] = sums[i, i:] - sums[i, i]
    best, trail = np.full(count, -np.inf), []
    best[0] = 0.0
    for _ in range(refreshes - 1):
        reached = best[:, None] + kept[:, :count]
        trail.append(reached.argmax(axis=0))
        best = reached.max(axis=0)
    steps = [int((best + kept[:, count]).argmax())]
    for came_from in reversed(trail):
        steps.append(int(came_from[steps[-1]]))
    return steps[::-1]


def bubble(
    rows: Sequence[set[int]],
    errors: Sequence[float],
    mlp_blocks: Sequence[int | None],
    blocks: Sequence[int],
    upstream: int,
) -> list[set[int]]:
    """Rows of refresh steps, those of the largest errors joined with all MLPs' not before them.

    `blocks`: the block of each row; `mlp_blocks`: the same for MLPs, else None.
    """
    worst = sorted(range(len(rows)), key=lambda n: errors[n], reverse=True)[:upstream]
    joined = [set(row) for row in rows]
    for n in worst:
        for row, block in zip(rows, mlp_blocks, strict=True):
            if block is not None and block >= blocks[n]:
                joined[n] |= row
    return joined


@dataclass
class _Measurement:
    """Samples of every sublayer's output at every step of one run."""

    run: int = -1
    schedule: int = 0
    layers: Sequence[Sublayer] = ()
    samples: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)

    def begin(self, run: int, layers: Sequence[Sublayer]) -> None:
        self.run, self.layers, self.samples = run, layers, {}

    def schedules(self, settings: BAC) -> list[tuple[int, ...]]:
        rows, errors = [], []
        places = sorted(self.samples[0])
        refreshes = max(round(settings.share * len(places)), 1)
        for n in range(len(self.layers)):
            values = torch.stack([self.samples[n][place] for place in places]).double()
            unit = torch.nn.functional.normalize(values, dim=1)
            steps = best_refreshes((unit @ unit.T).cpu().numpy(), refreshes, settings.adjacent)
            rows.append({places[step] for step in steps})
            errors.append(float(torch.cdist(values, values, p=1).mean()) / values.shape[1])
        blocks = [layer.block for layer in self.layers]
        mlps = [layer.block if layer.kind in ("mlp", "fused") else None for layer in self.layers]
        joined = bubble(rows, errors, mlps, blocks, settings.upstream)
        outside = set(range(self.schedule)) - set(places)  # of another expert, or left out
        return [tuple(int(p in row | outside) for p in range(self.schedule)) for row in joined]


class _Watch:
    def __init__(self, measurement: _Measurement, layer: int | None) -> None:
        self.measurement, self.layer = measurement, layer

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        if self.layer is None or site.outputs[0] is None:
            return
        self.measurement.schedule = context.schedule
        flat = site.outputs[0].detach().flatten()
        sample = flat[:: max(len(flat) // SAMPLES, 1)].float().clone()  # a view would hold it all
        self.measurement.samples.setdefault(self.layer, {})[context.place] = sample

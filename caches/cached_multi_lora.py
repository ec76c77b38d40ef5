"""Cached Multi-LoRA: one pass a LoRA, taking turns to be computed in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.hooks import adapters_of, using_adapter
from accel.method import AccelError, Handle, check, is_count
from accel.model_calls import dressed
from accel.site import Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor

EARLY, LATE, SHIFT = 0.375, 0.875, 120 / 220


@dataclass(frozen=True)
class CachedMultiLoRA:
    """Run the U-Net once for each LoRA and average the predictions; reuse deep features.

    Zou et al., "Cached Multi-LoRA Composition" (CMLoRA), ICLR 2025. At a refresh step one LoRA, in
    turn, is dominant: its pass is computed in full and weighs more. All other passes, and all of
    them between refreshes, compute the outermost layers alone and reuse their own deep feature, as
    DeepCache does at skip connection `branch`. Refresh steps: every 2nd in the first 37.5 % and the
    last 12.5 % of the run, every 3rd between, or every `interval`-th.

    `adapters`: loaded LoRAs that carry high frequencies (style, character, clothing, object) and
    dominate from the start; none means all active ones. `late`: low-frequency ones (background),
    of which one takes the first one's turn after 54.5 % of the run. Of n LoRAs the dominant one
    weighs n(n − ½)/(2n − 1½) / n at first, and ½, ¼, … less at each further turn, but no less than
    the others; weights sum to 1.

    The released code's three defects are not reproduced (weights never updated, a cleared copy, a
    schedule that runs everything in full). Static: rows of a batch are independent. Costs a shallow
    pass a LoRA and step; holds one feature a LoRA.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"interval": 2}, {"interval": 5})

    adapters: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    interval: int | None = None
    branch: int = 0

    def __post_init__(self) -> None:
        names = (*self.adapters, *self.late)
        if any(not isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise AccelError(
                f"CachedMultiLoRA: adapters and late need different names, not {names}"
            )
        interval = self.interval is None or is_count(self.interval, 1)
        check(interval, self, "interval", "None or a whole number ≥ 1")
        check(is_count(self.branch, 0), self, "branch", "a whole number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a U-Net with at least two LoRAs; raises when it has fewer."""
        spans = denoiser.skip_spans("CachedMultiLoRA")
        loaded, active = adapters_of(denoiser.module)
        first = self.adapters or tuple(name for name in active if name not in self.late)
        missing = [name for name in (*first, *self.late) if name not in loaded]
        if missing or len(first) + len(self.late) < 2:
            raise AccelError(
                f"CachedMultiLoRA needs at least two loaded LoRAs; asked for {first + self.late}, "
                f"loaded are {', '.join(loaded) or 'none'}"
            )
        check(self.branch < len(spans), self, "branch", f"below {len(spans)} for this U-Net")
        start, stop = spans[self.branch]
        turns = _Turns(self, first)
        layers = denoiser.cache(
            lambda branch: _Deep(turns, branch.name),
            HoldResidual(),
            start,
            stop,
            "CachedMultiLoRA",
            keeps_output=True,
        )
        passes = denoiser.between(_Passes(denoiser, turns).call, "CachedMultiLoRA")
        return Handle.together([layers, passes])

    def refreshes(self, total: int) -> list[int]:
        """The refresh steps of a run."""
        if self.interval is not None:
            return list(range(0, total, self.interval))
        early, late = int(EARLY * total), int(LATE * total)
        return [*range(0, early, 2), *range(early, late, 3), *range(late, total, 2)]


class _Turns:
    """Which LoRA dominates at a step, and by how much."""

    def __init__(self, settings: CachedMultiLoRA, first: tuple[str, ...]) -> None:
        self.settings, self.first = settings, first
        self.names = (*first, *settings.late)

    def dominant(self, step: int, total: int) -> str | None:
        """The LoRA computed in full at this step; None between refreshes."""
        refreshes = self.settings.refreshes(total)
        if step not in refreshes:
            return None
        shifted = bool(self.settings.late) and step >= SHIFT * total
        rotation = self.names[shifted : shifted + len(self.first)]
        return rotation[refreshes.index(step) % len(rotation)]

    def weights(self, step: int, total: int) -> list[float]:
        """Weights of the predictions, in the order of `names`; they sum to 1."""
        count = len(self.names)
        leader = self.dominant(step, total)
        if leader is None:
            return [1 / count] * count
        turn = self.settings.refreshes(total).index(step) // count
        strongest = count - 0.5
        weight = count * strongest / (strongest + count - 1)
        weight = max(weight - sum(0.5**j for j in range(1, turn + 1)), 1.0)
        rest = (count - weight) / (count - 1)
        return [(weight if name == leader else rest) / count for name in self.names]


class _Deep:
    """The deep layers of one LoRA's pass: computed when it dominates."""

    def __init__(self, turns: _Turns, name: str) -> None:
        self.turns, self.name = turns, name

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self.turns.dominant(context.step, context.total) != self.name

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass


class _Passes:
    """Runs the denoiser once for each LoRA and averages."""

    def __init__(self, denoiser: Denoiser, turns: _Turns) -> None:
        self.denoiser, self.turns = denoiser, turns

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline calls the denoiser."""
        clock = self.denoiser.clock
        assert clock.step is not None  # asked during a run only
        mean: Tensor | None = None
        weights = self.turns.weights(clock.step, clock.total)
        for place, (name, weight) in enumerate(zip(self.turns.names, weights, strict=True)):
            with using_adapter(self.denoiser.module, name):
                output = run(Branch(name, place), args, kwargs)
            mean = output[0] * weight if mean is None else mean + output[0] * weight
        return dressed(output)(mean)

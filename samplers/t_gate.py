"""T-GATE: cross-attention converges; from a gate on freeze it and drop guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import Handle, check, is_count, is_number
from accel.site import Branch, Computed, Policy, Signals, StepContext, Streams
from accel.sublayer import Sublayer, cache_sublayers, cross_attention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TGate:
    """Before the gate reuse self-attention, after it freeze cross-attention and run one branch.

    Zhang et al., "Cross-Attention Makes Inference Cumbersome" (T-GATE), 2024. In the first `gate`
    share of the steps both guidance branches run and cross-attention is live; after `warmup` steps
    self-attention is computed every `interval`-th step. The last of them is computed in full, and
    each cross-attention keeps the mean of both branches' outputs. From the gate on that mean stands
    for it, self-attention is live, and the conditional branch runs alone, without guidance.

    For models with cross-attention of their own; refused elsewhere. Takes the place of a guidance
    policy and of a cache. Differs: the text after the gate stays the conditional one, which nothing
    reads any more. Static: rows of a batch are independent. Holds one tensor an attention and
    branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"gate": 0.6, "interval": 1},
        {"gate": 0.4, "interval": 3},
        {"gate": 0.4},
    )

    gate: float = 0.4
    interval: int = 5
    warmup: int = 2

    def __post_init__(self) -> None:
        check(is_number(self.gate) and 0 < self.gate <= 1, self, "gate", "a share in (0, 1]")
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to all attention layers and to the guidance branches."""
        cross_attention(denoiser, "TGate")
        frozen = _Frozen()

        def policies(branch: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            store = frozen.of_run(denoiser.clock.run)
            return [
                _Cross(self, store.setdefault(n, {}), branch.name)
                if layer.kind == "cross"
                else _Self(self)
                for n, layer in enumerate(layers)
            ]

        kinds = ("self", "temporal", "cross")
        layers = cache_sublayers(denoiser, policies, HoldResidual(), "TGate", kinds)
        try:
            branches = guide(denoiser, lambda: _Drop(self), "TGate")
        except BaseException:
            layers.remove()
            raise
        denoiser.forgetting.append(frozen.forget)
        forgetting = Handle(lambda: denoiser.forgetting.remove(frozen.forget))
        return Handle.together([layers, branches, forgetting])

    def opens(self, total: int) -> int:
        """The first step behind the gate; at least one lies before it."""
        return max(round(self.gate * total), 1)


@dataclass
class _Frozen:
    """Outputs at the gate, by layer and branch, of one run."""

    run: int = -1
    outputs: dict[int, dict[str, Streams]] = field(default_factory=dict)

    def forget(self) -> None:
        """They are of another size now (staged sampling), or of another prompt."""
        self.run, self.outputs = -1, {}

    def of_run(self, run: int) -> dict[int, dict[str, Streams]]:
        if run != self.run:
            self.run, self.outputs = run, {}
        return self.outputs


class _Self:
    """Self-attention: every `interval`-th step between the warm-up and the gate."""

    def __init__(self, settings: TGate) -> None:
        self.settings = settings

    def skip(self, context: StepContext, signals: Signals) -> bool:
        last = self.settings.opens(context.total) - 1
        if context.step < self.settings.warmup or context.step >= last:
            return False
        return context.step % self.settings.interval != 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass


class _Cross:
    """Cross-attention: live before the gate, the branches' mean after it."""

    def __init__(self, settings: TGate, outputs: dict[str, Streams], branch: str) -> None:
        self.settings, self.outputs, self.branch = settings, outputs, branch

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return context.step >= self.settings.opens(context.total)

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        if context.step == self.settings.opens(context.total) - 1:
            self.outputs[self.branch] = site.outputs

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        branches = list(self.outputs.values())
        if not branches:
            return forecast
        return tuple(
            None if any(each is None for each in parts) else sum(parts) / len(parts)
            for parts in zip(*branches, strict=True)
        )


class _Drop:
    """Guidance before the gate only."""

    def __init__(self, settings: TGate) -> None:
        self.settings = settings

    def begin(self, context: GuidanceContext) -> str:
        return "full" if context.step < self.settings.opens(context.total) else "cond"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond

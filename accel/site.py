"""A site: a span of the denoiser that a policy may skip and an approximator then stands in for.

The span is the whole denoiser, or blocks [start, stop) of its chain. What is cached is the span's
residual, output minus input, one tensor per stream; or, where a site says so, its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from accel.kernels.relative_l1 import mean_distance

if TYPE_CHECKING:
    from torch import Tensor

    from accel.clock import StepClock
    from accel.family import Arguments

Streams = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Branch:
    """One guidance pass of a step: its name and its place among the step's denoiser calls."""

    name: str
    ordinal: int


@dataclass(frozen=True)
class StepContext:
    """What a policy may know without looking at a tensor.

    `step` of `total` in this run; `place` of `schedule` in the scheduler's whole schedule (they
    differ for image-to-image); `skipped` consecutive skips so far at this site and branch.
    """

    step: int
    total: int
    place: int
    clock: StepClock
    branch: Branch
    skipped: int

    @property
    def schedule(self) -> int:
        """Length of the scheduler's whole schedule."""
        return self.clock.schedule

    @property
    def timestep(self) -> float:
        """The scheduler's timestep, large for noisy; models here count up to 1000."""
        return self.clock.timesteps[self.place]

    @property
    def log_snr(self) -> float:
        """log(signal/noise) of the latent at this step."""
        return self.clock.log_snr[self.place]

    @property
    def last(self) -> bool:
        """Whether this is the run's last step."""
        return self.step == self.total - 1


class Signals(Protocol):
    """Tensors a policy may look at when it decides; reading one is free until it is compared."""

    @property
    def hidden(self) -> Tensor:
        """The span's input: hidden states, or the latent for the whole denoiser."""
        ...

    @property
    def entry(self) -> Tensor:
        """The chain's input in the layout of `hidden`."""
        ...

    @property
    def observed(self) -> Tensor:
        """The family's observer (see `accel.family.Observer`)."""
        ...

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """Frames, rows and columns of the hidden states' tokens; None where they form no grid."""
        ...

    @property
    def maps(self) -> Tensor:
        """`hidden` as (…, channels, rows, columns); tokens of mixed sizes fill what they cover."""
        ...

    def relative_change(self, new: Tensor, old: Tensor) -> float:
        """mean|new − old| / mean|old| in fp32, one host transfer; the same on every rank."""
        ...

    def mean_change(self, new: Tensor, old: Tensor, scale: Tensor | None = None) -> float:
        """mean|new − old| (over mean|scale| when given), otherwise as `relative_change`."""
        ...

    def agree(self, wanted: bool) -> bool:
        """Whether every rank that shares this sequence wants it; without such ranks, `wanted`."""
        ...


class Policy(Protocol):
    """Decides for one site and branch during one run; made anew for each run."""

    def skip(self, context: StepContext, signals: Signals) -> bool:
        """Whether to skip this step. Asked at every step that reaches the site."""
        ...

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> Streams | None:
        """Told after the span was computed, also when `skip` had said otherwise.

        For a layer inside a block it may return what is handed on and kept instead of the outputs.
        """
        ...


class Refining(Policy, Protocol):
    """A policy that computes a part of what it skips."""

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        """What stands in for the span, given its forecast.

        `compute()` runs the span's last part in full; in a layer inside a block,
        `compute(indices)` runs it for the tokens (batch, count) alone.
        """
        ...


class Shared:
    """Policies of several sites that are made together, once for each branch's state."""

    def __init__(self, make: Callable[[Branch], Sequence[Policy]]) -> None:
        self.make = make
        self.branch: Branch | None = None
        self.policies: dict[int, Policy] = {}
        """Those not given out yet; the others live as long as the branch's state."""

    def policy(self, index: int, branch: Branch) -> Policy:
        """Policy number `index`, once; `branch` is a new object for each new state."""
        if branch is not self.branch:
            self.branch, self.policies = branch, dict(enumerate(self.make(branch)))
        return self.policies.pop(index)


@dataclass(frozen=True)
class Computed:
    """A computed span: what went in, came out and is kept (the residual, or the output)."""

    inputs: Streams
    outputs: Streams
    kept: Streams


class History(Protocol):
    """What an approximator remembers of one site and branch."""

    def update(self, step: int, value: Streams, signals: Signals) -> None:
        """Remember the residual computed at `step`."""
        ...

    def predict(self, step: int, signals: Signals) -> Streams:
        """The residual expected at `step`."""
        ...

    @property
    def ready(self) -> bool:
        """Whether `predict` can be asked."""
        ...

    @property
    def extrapolates(self) -> bool:
        """Whether `predict` does more than repeat the last value."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything held, for the memory report."""
        ...


class Approximator(Protocol):
    """Stands in for a skipped span; a frozen dataclass of settings."""

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        ...

    def start(self, total: int) -> History:
        """An empty history for a run of `total` steps."""
        ...


@dataclass(frozen=True)
class Site:
    """A span with its policy and approximator.

    `stop` None means the whole denoiser, 0 a layer inside a block (see `accel.sublayer`).
    `keeps_output`: what is kept and forecast is the span's output instead of its residual.
    """

    start: int
    stop: int | None
    policy: Callable[[Branch], Policy]
    reuse: Approximator
    keeps_output: bool = False


@dataclass
class SiteState:
    """One site of one branch during one run."""

    policy: Policy
    history: History
    skipped: int = 0
    dress: Callable[[Any], Any] = lambda prediction: prediction
    """Gives a whole denoiser's prediction the form that the denoiser returns."""


@dataclass
class BranchState:
    """Everything kept for one branch of one denoiser during one run."""

    branch: Branch
    signature: tuple[Any, ...]
    condition: Any
    sites: list[SiteState]
    last: int | None = None
    """The last step at which the branch was called."""


@dataclass
class Forward:
    """One denoiser call in flight."""

    state: BranchState
    step: int
    total: int
    place: int
    clock: StepClock
    arguments: Arguments
    returning: bool = False
    """Whether the branch was left out at the step before."""
    blocks: int = 0
    blocks_run: float = 0
    verdict: str = "computed"
    inputs: dict[int, Streams] = field(default_factory=dict)
    """Streams that entered each site, by the site's number."""
    entry: Streams = ()
    entry_arguments: Any = None
    skipping: set[int] = field(default_factory=set)
    kept: dict[int, tuple[Streams, Signals]] = field(default_factory=dict)
    """What each computed site gave its history, and with which signals."""

    def context(self, site: SiteState) -> StepContext:
        """The step as the site's policy sees it."""
        return StepContext(
            self.step, self.total, self.place, self.clock, self.state.branch, site.skipped
        )

    def decide(self, index: int, signals: Signals) -> bool:
        """Ask the policy of site number `index`; True means skip.

        A branch that guidance left out at the step before is computed, whatever the policy says:
        what it remembers is too old to be repeated or extrapolated.
        """
        site = self.state.sites[index]
        wanted = signals.agree(site.policy.skip(self.context(site), signals))
        skip = wanted and site.history.ready and not self.returning
        if skip:
            site.skipped += 1
            self.skipping.add(index)
            self.verdict = "extrapolated" if site.history.extrapolates else "reused"
        return skip

    def forecast(self, index: int, signals: Signals, compute: Callable[..., Streams]) -> Streams:
        """What stands in for the skipped span of site `index`; `compute`: see `Refining`."""
        site = self.state.sites[index]
        forecast = site.history.predict(self.step, signals)
        refine = getattr(site.policy, "refine", None)
        if refine is None:
            return forecast
        refined: Streams = refine(self.context(site), signals, forecast, compute)
        return refined

    def remember(self, index: int, signals: Signals, computed: Computed) -> Streams:
        """The span of site `index` was computed; returns what is kept of it."""
        site = self.state.sites[index]
        kept = site.policy.computed(self.context(site), signals, computed) or computed.kept
        site.history.update(self.step, kept, signals)
        self.kept[index] = (kept, signals)
        site.skipped = 0
        return kept


def mean_change(new: Tensor, old: Tensor, scale: Tensor | None = None, group: Any = None) -> float:
    """mean|new − old| / mean|scale| in fp32; averaged over `group`'s ranks so that all agree."""
    both = mean_distance(new, old, scale)
    if group is not None:
        torch.distributed.all_reduce(both, group=group)
    change, total = both.tolist()
    return float(change) / (float(total) + 1e-8)


def residual(outputs: Streams, inputs: Streams) -> Streams:
    """Output minus input for each stream that has both in one shape; None for the others."""
    return tuple(
        y - x.to(y.device) if y is not None and x is not None and y.shape == x.shape else None
        for y, x in zip(outputs, inputs, strict=True)
    )


def add(inputs: Streams, residuals: Streams) -> Streams:
    """Input plus residual for each stream; None where there is no residual."""
    return tuple(
        x + r.to(x) if r is not None and x is not None else None
        for x, r in zip(inputs, residuals, strict=True)
    )

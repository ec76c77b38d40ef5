"""ClusCa: compute one token of every cluster, and let it correct the forecast of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.caches.approximators import Taylor
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Computed, Policy, Signals, StepContext, Streams
from accel.sublayer import Sublayer, cache_sublayers

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 10


@dataclass(frozen=True)
class ClusCa:
    """Forecast all outputs; in MLPs blend in what one computed token of each cluster says.

    Zheng et al., "Compute Only 16 Tokens in One Timestep" (ClusCa), 2025. After `warmup` full steps
    every `interval`-th step is full. At a full step the tokens that enter a branch's first MLP are
    clustered by k-means (L1 distance, at most ten rounds, from the centres before). On the others
    one random token of each of the `clusters` is computed in every MLP over the same tokens, and an
    output is `blend` · its cluster's fresh one + (1 − `blend`) · forecast; computed tokens keep
    their own. Random choices have their own fixed seed: the pipeline's generator is not touched.

    Rows of a batch have their own clusters. Holds what `reuse` holds, for a sublayer and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 3},
        {"interval": 5},
        {"interval": 5, "blend": 0.1},
    )

    interval: int = 5
    clusters: int = 16
    blend: float = 0.005
    warmup: int = 3
    reuse: Approximator = Taylor(1)

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.clusters, 1), self, "clusters", "a whole number ≥ 1")
        check(is_number(self.blend) and 0 <= self.blend <= 1, self, "blend", "between 0 and 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""

        def policies(_: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            mlps = [n for n, layer in enumerate(layers) if layer.kind == "mlp"]
            groups = _Clusters(self.clusters)
            first = mlps[0] if mlps else -1
            return [_Layer(self, layer, groups, n == first) for n, layer in enumerate(layers)]

        return cache_sublayers(denoiser, policies, self.reuse, "ClusCa")


class _Clusters:
    """The clusters of one branch's tokens."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(0)
        self.members: Tensor | None = None
        """(batch, tokens): the cluster of each token."""
        self.centres: Tensor | None = None

    def update(self, tokens: Tensor) -> None:
        """Cluster (batch, tokens, channels)."""
        tokens = tokens.float()
        count = min(self.count, tokens.shape[1])
        if self.centres is None:
            first = torch.randperm(tokens.shape[1], generator=self.generator)[:count]
            self.centres = tokens[:, first.to(tokens.device)]
        for _ in range(ROUNDS):
            members = torch.cdist(tokens, self.centres, p=1).argmin(-1)
            if self.members is not None and torch.equal(members, self.members):
                break
            self.members = members
            chosen = torch.nn.functional.one_hot(members, count).to(tokens.dtype)
            sizes = chosen.sum(1).unsqueeze(-1)
            means = chosen.transpose(1, 2) @ tokens / sizes.clamp(min=1)
            self.centres = torch.where(sizes > 0, means, self.centres)

    def picks(self) -> Tensor:
        """(batch, clusters): a random token of each cluster; of an empty one any token."""
        assert self.members is not None and self.centres is not None  # made at a full step
        lots = torch.rand(self.members.shape, generator=self.generator)[..., None]
        lots = lots.to(self.members.device, non_blocking=True)
        inside = torch.nn.functional.one_hot(self.members, self.centres.shape[1]).bool()
        return torch.where(inside, lots + 1, lots).argmax(1)


class _Layer:
    def __init__(self, settings: ClusCa, layer: Sublayer, clusters: _Clusters, leads: bool) -> None:
        self.settings, self.layer, self.clusters, self.leads = settings, layer, clusters, leads

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if context.step < self.settings.warmup:
            return False
        return context.skipped < self.settings.interval - 1

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        if self.leads and site.inputs[0] is not None and self.settings.interval > 1:
            self.clusters.update(site.inputs[0])

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        output, members = forecast[0], self.clusters.members
        if self.layer.kind != "mlp" or output is None or members is None:
            return forecast
        if output.shape[:2] != members.shape:
            return forecast
        picks = self.clusters.picks()
        (fresh,) = compute(picks)
        assert fresh is not None  # a layer returns a tensor
        wide = members.unsqueeze(-1).expand_as(output)
        blended = torch.lerp(output, fresh.gather(1, wide), self.settings.blend)
        return (blended.scatter(1, picks.unsqueeze(-1).expand_as(fresh), fresh), *forecast[1:])

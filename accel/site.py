"""A site: a span of the denoiser that a policy may skip and an approximator then stands in for.

The span is the whole denoiser, or blocks [start, stop) of its chain. What is cached is the span's
residual, output minus input, one tensor per stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

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
    schedule: int
    branch: Branch
    skipped: int

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

    def mean_change(new: Tensor, old: Tensor, scale: Tensor | None = None, group: Any = None) -> float:
    """mean|new − old| / mean|scale| in fp32; averaged over `group`'s ranks so that all agree."""
    difference = (new.float() - old.float()).abs().mean()
    size = torch.ones_like(difference) if scale is None else scale.float().abs().mean()
    both = torch.stack((difference, size))
    if group is not None:
        torch.distributed.all_reduce(both, group=group)
    change, total = both.tolist()
    return float(change) / (float(total) + 1e-8)


def residual(outputs: Streams, inputs: Streams) -> Streams:
    """Output minus input for each stream that has both in one shape; None for the others."""
    return tuple(
        y - x if y is not None and x is not None and y.shape == x.shape else None
        for y, x in zip(outputs, inputs, strict=True)
    )


def add(inputs: Streams, residuals: Streams) -> Streams:
    """Input plus residual for each stream; None where there is no residual."""
    return tuple(
        x + r.to(x.dtype) if r is not None and x is not None else None
        for x, r in zip(inputs, residuals, strict=True)
    )

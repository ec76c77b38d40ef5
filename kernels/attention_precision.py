"""Adaptive precision: the lowest precision that each layer bears at each part of the schedule."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from accel.attention_calls import AttentionCall
from accel.kernels.attention_table import KERNELS

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BUCKETS = 5
"""Parts of the schedule that have a precision of their own."""
ROWS = 256
"""Queries of a call that are compared; each is exact by itself, so a part of them is enough."""

Plan = Mapping[str, Sequence[str]]
"""Layer name → one kernel name for each part of the schedule."""


def bucket(place: int, schedule: int) -> int:
    """The part of the schedule in which step `place` lies."""
    return min(place * BUCKETS // max(schedule, 1), BUCKETS - 1)


class Calibration:
    """Gathers how far each kernel's output is from the exact one, while a run stays exact.

    The worst call of a layer and part decides: least cosine similarity, greatest relative L1.
    """

    def __init__(self, candidates: Sequence[str], similarity: float, error: float) -> None:
        self.candidates = candidates
        self.similarity, self.error = similarity, error
        self.worst: dict[tuple[str, int, str], tuple[float, float]] = {}
        self.failed: set[str] = set()

    def attend(self, call: AttentionCall, part: int, usable: Sequence[str]) -> Tensor:
        """The exact output; what each `usable` kernel would have given is compared with it.

        A kernel that fails is said and left out from then on.
        """
        output = call.plain()
        stride = 1 if call.is_causal else max(call.query.shape[2] // ROWS, 1)
        sampled = replace(call, query=call.query[:, :, ::stride])
        exact = output[:, :, ::stride].float()
        for name in sorted(set(usable) - self.failed, key=usable.index):
            key = (call.layer.name, part, name)
            try:
                given = KERNELS[name].run(sampled).float()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler's or a driver's: no run may die of it
                logger.warning("Attention: %s failed: %s: %s", name, type(error).__name__, error)
                self.failed.add(name)
                continue
            cosine, relative = self.worst.get(key, (1.0, 0.0))
            found = float(functional.cosine_similarity(given.flatten(), exact.flatten(), dim=0))
            distance = float((given - exact).abs().sum() / exact.abs().sum().clamp(min=1e-12))
            # `not <` keeps a NaN as the worst value that there is
            self.worst[key] = (
                found if not found >= cosine else cosine,
                distance if not distance <= relative else relative,
            )
        return output

    def plan(self) -> dict[str, tuple[str, ...]]:
        """For each layer and part the first candidate that is close enough, or "sdpa"."""
        layers = dict.fromkeys(layer for layer, _, _ in self.worst)
        return {
            layer: tuple(self._chosen(layer, part) for part in range(BUCKETS)) for layer in layers
        }

    def _chosen(self, layer: str, part: int) -> str:
        for name in self.candidates:
            cosine, distance = self.worst.get((layer, part, name), (0.0, 1.0))
            if cosine >= self.similarity and distance <= self.error:
                return name
        return "sdpa"

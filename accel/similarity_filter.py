"""The stochastic similarity filter of StreamDiffusion: frames like the last one are left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.method import check, is_count, is_number


@dataclass
class SimilarityFilter:
    """Skip a frame with probability max(0, (S − η)/(1 − η)).

    Kodaira et al., "StreamDiffusion", ICCV 2025, §3.4. S is the cosine similarity of a frame and
    the last one that was processed, each less its mean; η `threshold`; 1 switches the filter off.
    After `most` consecutive skips a frame is processed. Differs from the reference: the mean is
    taken off, because brightness alone makes any two frames alike; the count of skips begins anew
    at every processed frame, not at forced ones only; and nothing sleeps, the source sets the pace.
    """

    threshold: float = 0.98
    most: int = 10
    seed: int = 0
    _last: Tensor | None = field(default=None, init=False, repr=False)
    _skipped: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and 0 <= self.threshold <= 1, self, "threshold", "0 to 1")
        check(is_count(self.most, 0), self, "most", "a whole number ≥ 0")
        self._generator = torch.Generator().manual_seed(self.seed)

    def skip(self, frame: Tensor) -> bool:
        """Whether to leave out `frame` (any shape, values in [0, 1])."""
        flat = frame.detach().float().flatten().cpu()
        if self._last is not None and self.threshold < 1 and self._skipped < self.most:
            similarity = _likeness(flat, self._last)
            chance = (similarity - self.threshold) / (1 - self.threshold)
            if chance > 0 and float(torch.rand((), generator=self._generator)) <= chance:
                self._skipped += 1
                return True
        self._last, self._skipped = flat, 0
        return False


def _likeness(frame: Tensor, last: Tensor) -> float:
    if torch.equal(frame, last):
        return 1.0
    return float(torch.cosine_similarity(frame - frame.mean(), last - last.mean(), dim=0))

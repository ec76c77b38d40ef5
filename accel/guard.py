"""The guard: predictions that were not computed are looked at before the sampler gets them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accel.method import AccelError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LIMIT = 1.0
"""The largest relative change since the branch's last computed prediction that is trusted, where
no calibration says what good stand-ins do."""


class Guard:
    """Refuses a stand-in that is not finite or far from what its branch computed last.

    Predictions of one branch turn slowly from step to step; where one picture's differs from its
    last computed prediction by more than that prediction's size, it has drifted (unrelated
    predictions of equal size differ by 1.4 times it). A calibration knows the `limit` of its
    methods. Costs one host transfer for each stand-in. `strict` raises `AccelError` instead of
    computing the step.
    """

    def __init__(self, strict: bool = False, limit: float = LIMIT) -> None:
        self.strict, self.limit = strict, limit
        self.largest = 0.0
        """The largest change that was trusted."""
        self.repaired = 0
        """Stand-ins refused in this run."""
        self._known: dict[tuple[str, str, int], Tensor] = {}

    def begin(self) -> None:
        """A new run."""
        self.repaired = 0
        self.forget()

    def forget(self) -> None:
        """The run is over: its predictions are let go."""
        self._known.clear()

    def computed(self, branch: tuple[str, str, int], prediction: Tensor) -> None:
        """The branch was computed: stand-ins are compared with this."""
        self._known[branch] = prediction.detach()

    def trusts(self, branch: tuple[str, str, int], prediction: Tensor, step: int) -> bool:
        """Whether a stand-in may be used; False means compute the step after all."""
        known = self._known[branch]
        apart, size = (_lengths(each) for each in (prediction - known, known))
        change = float((apart / (size + 1e-8)).max())
        if change <= self.limit:  # False for NaN too
            self.largest = max(self.largest, change)
            return True
        text = (
            f"step {step}, branch {branch[1]!r} of {branch[0]}: the cached prediction is "
            f"{change:.3g} times its size away from the last computed one (at most "
            f"{self.limit:.3g})"
        )
        if self.strict:
            raise AccelError(f"{text}; take milder settings, or strict=False to compute such steps")
        logger.warning("%s; the step is computed", text)
        self.repaired += 1
        return False


def _lengths(predictions: Tensor) -> Tensor:
    """Norms of a batch's samples, (batch,)."""
    lengths: Tensor = predictions.float().flatten(1).norm(dim=1)
    return lengths

"""Limited-interval guidance: guide at the noise levels where it helps, run one branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GuidanceInterval:
    """Guide only while λ = ln(α²/σ²) of the latent lies in [`lowest`, `highest`].

    Kynkäänniemi et al., "Applying Guidance in a Limited Interval", NeurIPS 2024. Outside, the
    conditional branch runs alone and stands for the other too, so guidance is off there. λ grows
    from noise (−∞) to data: in λ the interval survives other step counts, shifts and sizes. None
    is no bound. Text-to-image models fix the layout early, so the default keeps the noisy part.
    Static: rows of a batch are independent.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"highest": 2.0},
        {"highest": 0.0},
        {"highest": -2.0},
    )

    lowest: float | None = None
    highest: float | None = 0.0

    def __post_init__(self) -> None:
        for field in ("lowest", "highest"):
            value = getattr(self, field)
            check(value is None or is_number(value), self, field, "None or a number")
        ends = (self.lowest, self.highest)
        if ends[0] is not None and ends[1] is not None:
            check(ends[0] <= ends[1], self, "lowest", "at most `highest`")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches."""
        return guide(denoiser, lambda: _Interval(self), "GuidanceInterval")


class _Interval:
    def __init__(self, settings: GuidanceInterval) -> None:
        self.settings = settings

    def begin(self, context: GuidanceContext) -> str:
        log_snr = 2 * context.log_snr
        below = self.settings.lowest is not None and log_snr < self.settings.lowest
        above = self.settings.highest is not None and log_snr > self.settings.highest
        return "cond" if below or above else "full"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond

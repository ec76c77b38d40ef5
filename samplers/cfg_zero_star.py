"""CFG-Zero*: scale the unconditional prediction to fit, and skip the first steps of a flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.clock import StepClock
from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import AccelError, Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor

FLOW = {"flux", "sd3", "wan", "hunyuan_video", "ltx", "qwen_image", "mochi"}


@dataclass(frozen=True)
class CfgZeroStar:
    """Guide with s·u instead of u, s = ⟨c, u⟩ / ‖u‖² for each row; predict 0 in the first steps.

    Fan et al., "CFG-Zero*", 2025, for flow matching. A velocity of zero leaves the latent as it is,
    so in the first `zero` share of the steps the denoiser is not run at all. Otherwise both
    branches run: a method for quality whose first steps are free. Rows of a batch are independent.
    Qwen-Image's pipeline divides by the norm of the guided prediction: `zero` must be 0 there.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"zero": 0.0}, {"zero": 0.04}, {"zero": 0.08})

    zero: float = 0.04

    def __post_init__(self) -> None:
        check(is_number(self.zero) and 0 <= self.zero < 1, self, "zero", "a share in [0, 1)")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches; raises for models that do not predict a velocity."""
        if denoiser.family.name not in FLOW:
            raise AccelError(
                f"CfgZeroStar is for flow matching; {type(denoiser.module).__name__} is not known "
                "to be"
            )
        if denoiser.family.name == "qwen_image" and self.zero > 0:
            raise AccelError(
                f"CfgZeroStar(zero={self.zero}): Qwen-Image's pipeline divides by the norm of the "
                "guided prediction; use zero=0"
            )
        return guide(denoiser, lambda: _Scaled(self, denoiser.clock), "CfgZeroStar")


class _Scaled:
    def __init__(self, settings: CfgZeroStar, clock: StepClock) -> None:
        self.settings, self.clock = settings, clock

    def begin(self, context: GuidanceContext) -> str:
        if self.clock.start:  # image-to-image: a latent that stays loses its share of the noise
            return "full"
        return "zero" if context.step < round(self.settings.zero * context.total) else "full"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        c, u = cond.float().flatten(1), uncond.float().flatten(1)
        scale = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
        scaled: Tensor = uncond * scale.reshape(-1, *[1] * (uncond.dim() - 1)).to(uncond.dtype)
        return scaled

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond

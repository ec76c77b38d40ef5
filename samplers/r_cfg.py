"""RCFG: image-to-image knows its input, and the noise that explains it stands for a branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import AccelError, Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor

NEGATIVES = ("self", "once")


@dataclass(frozen=True)
class RCFG:
    """Residual guidance for image-to-image: no or one unconditional evaluation in a run.

    Kodaira et al., "StreamDiffusion", ICCV 2025. With x_in the clean latent of the input picture
    and x = α·x_in + σ·n, the noise n takes the unconditional prediction's place, times `delta`.
    `negative`: "self" evaluates no negative prompt; "once" evaluates it at the first step, and its
    clean estimate x_neg takes x_in's place. Written in the denoiser's own output: ε, v, flow.

    Differs from the released code: x_in is kept instead of a recursion over n, the same but for
    LCM's scalings. Raises `AccelError` where a run has no input picture. Static: rows of a batch
    are independent. Holds one latent.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"negative": "once"}, {})

    negative: str = "self"
    delta: float = 1.0

    def __post_init__(self) -> None:
        check(self.negative in NEGATIVES, self, "negative", " or ".join(NEGATIVES))
        check(is_number(self.delta) and self.delta >= 0, self, "delta", "a number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches."""
        return guide(denoiser, lambda: _Residual(self, denoiser), "RCFG")


class _Residual:
    def __init__(self, settings: RCFG, denoiser: Denoiser) -> None:
        self.settings, self.denoiser = settings, denoiser
        self.negative: Tensor | None = None

    def begin(self, context: GuidanceContext) -> str:
        if self.denoiser.clock.clean is None:
            raise AccelError(
                "RCFG needs an image-to-image run: no clean latent was noised before the first "
                "step; CfgCache and AdaptiveGuidance work without an input picture"
            )
        kind = self.denoiser.clock.prediction
        if kind not in ("epsilon", "v_prediction", "flow"):
            raise AccelError(f"RCFG: a denoiser that predicts {kind!r} is not known")
        return "full" if self.settings.negative == "once" and self.negative is None else "cond"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        latent = context.latent[: len(cond)].float()
        alpha, sigma = self._levels(context)
        kind, found = self.denoiser.clock.prediction, uncond.float()
        noise = {"flow": latent + alpha * found, "v_prediction": sigma * latent + alpha * found}
        self.negative = (latent - sigma * noise.get(kind, found)) / alpha
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        latent = context.latent[: len(cond)].float()
        known = self._clean(context, latent) if self.negative is None else self.negative
        alpha, sigma = self._levels(context)
        noise = self.settings.delta * (latent - alpha * known) / sigma
        kind = self.denoiser.clock.prediction
        forms = {"flow": (noise - latent) / alpha, "v_prediction": (noise - sigma * latent) / alpha}
        found: Tensor = forms.get(kind, noise).to(cond.dtype)
        return found

    def _clean(self, context: GuidanceContext, latent: Tensor) -> Tensor:
        """The input picture's latent, packed as the denoiser's input is."""
        clean: Tensor = self.denoiser.clock.clean.to(latent)
        if latent.dim() == 3 and clean.dim() != 3:
            clean = context.tokens(clean if clean.dim() == 5 else clean[:, None])
        return clean.repeat_interleave(len(latent) // len(clean), 0)

    def _levels(self, context: GuidanceContext) -> tuple[float, float]:
        """α and σ of the latent at this step."""
        ratio = torch.tensor(context.log_snr, dtype=torch.float64)
        if self.denoiser.clock.prediction == "flow":
            return float(ratio.sigmoid()), float((-ratio).sigmoid())
        return float((2 * ratio).sigmoid().sqrt()), float((-2 * ratio).sigmoid().sqrt())

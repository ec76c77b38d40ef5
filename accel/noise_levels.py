"""How noisy a latent is along a scheduler's run, for flow matching, VP and VE schedulers alike.

A latent is a·data + s·noise. Flow matching: a = 1 − σ, s = σ. Variance preserving (VP): a² + s² is
1. Variance exploding (VE): a = 1. `ratio` is s/a in all of them; the schedulers' own `sigmas` are σ
for flow matching and the ratio for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from accel.method import AccelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Sigmas = tuple[float, ...]
Kind = Literal["flow", "vp", "ve"]

KINDS: dict[str, Kind] = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "DDIMScheduler": "vp",
    "CogVideoXDDIMScheduler": "vp",
    "DPMSolverMultistepScheduler": "vp",
    "DEISMultistepScheduler": "vp",
    "UniPCMultistepScheduler": "vp",
    "EulerDiscreteScheduler": "ve",
    "EulerAncestralDiscreteScheduler": "ve",
}
"""Schedulers whose steps go from one entry of a list of noise levels to the next."""
REFUSED = ("invert_sigmas", "thresholding", "stochastic_sampling")
"""Settings with which a step is no function of two noise levels and the element alone."""


@dataclass(frozen=True)
class NoiseLevels:
    """The levels of one run: `sigmas` has one entry more than the run has steps.

    `prediction` is what the denoiser returns: "velocity", "epsilon", "v_prediction" or "sample".
    `ratios` are those of all training timesteps, for VP and VE.
    """

    kind: Kind
    prediction: str
    sigmas: Sigmas
    train: int
    ratios: Sigmas = ()

    @classmethod
    def of(cls, scheduler: Any) -> NoiseLevels:
        """Read a scheduler after `set_timesteps`; raises for one that cannot be staged."""
        name, config = type(scheduler).__name__, scheduler.config
        if name not in KINDS:
            raise AccelError(
                f"{name} cannot be staged: its steps need more than two noise levels; accepted: "
                f"{', '.join(KINDS)}"
            )
        for setting in REFUSED:
            if config.get(setting):
                raise AccelError(f"{name}({setting}=True) cannot be staged; switch it off")
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        kind: Kind = "flow" if flow else KINDS[name]
        prediction = "velocity" if kind == "flow" else config.prediction_type
        train = config.num_train_timesteps
        if kind == "flow":
            return cls(kind, prediction, tuple(scheduler.sigmas.tolist()), train)
        signal = scheduler.alphas_cumprod.double()
        ratios = ((1 - signal) / signal).sqrt()
        if hasattr(scheduler, "sigmas"):
            sigmas = tuple(scheduler.sigmas.tolist())
        else:
            sigmas = (*ratios[scheduler.timesteps.cpu()].tolist(), 0.0)
        return cls(kind, prediction, sigmas, train, tuple(ratios.tolist()))

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(self.sigmas) - 1

    def ratio(self, sigma: float) -> float:
        """Noise over signal; infinite for pure noise."""
        if self.kind != "flow":
            return sigma
        return sigma / (1 - sigma) if sigma < 1 else math.inf

    def sigma(self, ratio: float) -> float:
        """The inverse of `ratio`."""
        if self.kind != "flow":
            return ratio
        return 1.0 if math.isinf(ratio) else ratio / (1 + ratio)

    def weights(self, sigma: float) -> tuple[float, float]:
        """(a, s) of the latent a·data + s·noise."""
        if self.kind == "flow":
            return 1 - sigma, sigma
        if self.kind == "ve":
            return 1.0, sigma
        signal = 1 / math.sqrt(1 + sigma**2)
        return signal, sigma * signal

    def noisier(self, sigma: float, factor: float, what: str) -> float:
        """The level whose ratio is `factor` times that of `sigma`; `what` names it in the error."""
        found = self.sigma(self.ratio(sigma) * factor)
        if found > self.sigmas[0] or found <= 0:
            raise AccelError(
                f"{what} would need the noise level {found:.3g}, outside of this scheduler's "
                f"({self.sigmas[0]:.3g} to 0): move the change of size to another step, or take "
                "less noise"
            )
        return found

    def clean(self, sample: Tensor, output: Tensor, sigma: float) -> Tensor:
        """The data that the denoiser's `output` at `sample` speaks of."""
        a, s = self.weights(sigma)
        if self.prediction == "velocity":
            return sample - sigma * output
        if self.prediction == "sample":
            return output
        if self.prediction == "epsilon":
            return (sample - s * output) / a
        preserved = 1 / math.sqrt(a**2 + s**2)  # brings a VE latent to variance 1
        return (preserved**2) * a * sample - preserved * s * output

    def curve(self, shift: float) -> NDArray[np.float64]:
        """The run's sigmas, for flow matching with their ratios multiplied by `shift`."""
        base = np.asarray(self.sigmas)
        return shift * base / (1 + (shift - 1) * base) if self.kind == "flow" else base

    def spaced(self, start: float, end: float, steps: int, shift: float = 1.0) -> Sigmas:
        """`steps` + 1 levels from `start` to `end`, as dense as the run's own, shifted.

        Where `start` and `end` are entries of the run and `shift` is 1, entries come out exactly.
        """
        curve = self.curve(shift)
        places = np.arange(len(curve), dtype=float)
        first, last = np.interp([-start, -end], -curve, places)
        found = np.interp(np.linspace(first, last, steps + 1), places, curve)
        return (start, *found[1:-1].tolist(), end)

    def timestep(self, sigma: float) -> float:
        """The training timestep of a level, between the whole ones by interpolation."""
        if self.kind == "flow":
            return sigma * self.train
        places = np.arange(len(self.ratios), dtype=float)
        return float(np.interp(math.log(max(sigma, 1e-12)), np.log(self.ratios), places))

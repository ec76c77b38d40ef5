"""Where a run stands: which step of how many, counted by the scheduler and not by the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StepClock:
    """Step clock of one pipeline.

    A run begins with `scheduler.set_timesteps`, a step ends with `scheduler.step`; several denoiser
    calls in one step (guidance branches, other passes) share the step. Between runs `step` is None.
    """

    step: int | None = None
    total: int = 0
    timesteps: list[float] = field(default_factory=list)
    """The scheduler's whole schedule; longer than `total` for image-to-image."""
    log_snr: list[float] = field(default_factory=list)
    """log(signal/noise) at each of `timesteps`."""
    run: int = 0
    completed: int = 0
    """Number of the last run that made all its steps."""
    listeners: list[Callable[[], None]] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)
    """The arguments of the pipeline call in progress, by name, with its defaults."""
    clean: Any = None
    """The clean latent that an image-to-image run noised, as the pipeline holds it."""
    prediction: str = "epsilon"
    """What the denoiser predicts: "flow", "epsilon", "v_prediction" or "sample"."""
    staging: Any = None
    """The `StagedRun` of a method that samples in stages (see `accel.staging`)."""

    @property
    def schedule(self) -> int:
        """Length of the scheduler's whole schedule."""
        return len(self.timesteps)

    def begin(self, timesteps: list[float], log_snr: list[float] | None = None) -> None:
        """A new run over these timesteps: everybody forgets."""
        self.run += 1
        self.step, self.total, self.timesteps = 0, len(timesteps), timesteps
        self.log_snr = log_snr or [0.0] * len(timesteps)
        self.clean = None
        for forget in self.listeners:
            forget()

    def shorten(self, total: int) -> None:
        """The loop makes only the last `total` steps of the schedule (known at its first step)."""
        self.total = total

    def advance(self) -> None:
        """The scheduler finished a step."""
        if self.step is not None:
            self.step += 1
            if self.step == self.total:
                self.completed = self.run

    def end(self) -> None:
        """The run is over, normally or by an exception."""
        self.step = None
        self.call, self.clean = {}, None

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
    start: int = 0
    """The place in the schedule of the run's first step: above 0 for image-to-image."""
    timesteps: list[float] = field(default_factory=list)
    """The scheduler's whole schedule; longer than `total` where a run makes a part of it."""
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
    guided: bool | None = None
    """Whether the pipeline says that this run has guidance; None where it does not say."""
    staging: Any = None
    """The `StagedRun` of a method that samples in stages (see `accel.staging`)."""

    @property
    def schedule(self) -> int:
        """Length of the scheduler's whole schedule."""
        return len(self.timesteps)

    @property
    def place(self) -> int:
        """Where in the schedule the step in progress is."""
        assert self.step is not None  # asked during a run only
        return self.start + self.step

    def begin(self, timesteps: list[float], log_snr: list[float] | None = None) -> None:
        """A new run over these timesteps: everybody forgets."""
        self.run += 1
        self.step, self.total, self.start, self.timesteps = 0, len(timesteps), 0, timesteps
        self.log_snr = log_snr or [0.0] * len(timesteps)
        self.clean, self.guided = None, None
        for forget in self.listeners:
            forget()

    def shorten(self, total: int, start: int) -> None:
        """The loop makes `total` steps of the schedule from `start` on; known at its first step."""
        self.total, self.start = total, start

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

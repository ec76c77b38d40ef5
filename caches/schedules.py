"""Static rules that several methods share: which steps to skip, known before the run."""

from __future__ import annotations

from dataclasses import dataclass

from accel.site import Computed, Signals, StepContext


@dataclass
class Cycle:
    """Compute `warmup` steps, of which the last begins a cycle, then every `interval`-th."""

    interval: int
    warmup: int = 1

    def skip(self, context: StepContext, signals: Signals) -> bool:
        """Whether the step lies between two computed ones."""
        past = context.step - self.warmup
        return past >= 0 and (past + 1) % self.interval != 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Nothing to learn."""


@dataclass
class Table:
    """Compute where the table has a 1; step i of N takes entry ⌊i·length / N⌋."""

    entries: tuple[int, ...]

    def skip(self, context: StepContext, signals: Signals) -> bool:
        """Whether the step's entry is 0."""
        return self.entries[context.place * len(self.entries) // context.schedule] == 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Nothing to learn."""

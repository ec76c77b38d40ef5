"""The memory budget: what caches will hold, from the first step's tensors, lowered or refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from accel.method import AccelError

if TYPE_CHECKING:
    from accel.site import Approximator, Forward, Site, SiteState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """The most bytes that the caches of a denoiser may hold in a run.

    A site will hold its first step's tensors times the depth of its approximator, in every guidance
    branch. When that is too much, sites fall back to `least`, the approximator that holds least;
    when that is too much as well, `AccelError` gives the number.
    """

    limit: int
    least: Approximator

    def shared(self, denoisers: int) -> Budget:
        """The part of each of the denoisers of one pipeline, which hold theirs at once."""
        return replace(self, limit=self.limit // denoisers)

    def apply(self, name: str, forward: Forward, sites: Sequence[Site], branches: int) -> None:
        """Check one branch after its first step, and lower what its sites will hold."""
        states, total = forward.state.sites, forward.total
        wanted = self._needed(states, [site.reuse.depth(total) for site in sites], branches)
        if wanted <= self.limit:
            return
        needed = self._needed(states, [self.least.depth(total)] * len(sites), branches)
        if needed > self.limit:
            raise AccelError(
                f"{name}: the caches would hold {needed / 1e9:.3g} GB in {branches} guidance "
                f"branch(es), over the budget of {self.limit / 1e9:.3g} GB; take a method that "
                "holds less: one residual of the whole stack (MagCache, PlainCycle)"
            )
        logger.warning(
            "%s: %.3g GB would be held, over the budget of %.3g GB; %r holds %.3g GB and is used",
            name,
            wanted / 1e9,
            self.limit / 1e9,
            self.least,
            needed / 1e9,
        )
        for number, state in enumerate(states):
            if number in forward.kept:
                kept, signals = forward.kept[number]
                state.history = self.least.start(total)
                state.history.update(forward.step, kept, signals)

    def _needed(self, states: Sequence[SiteState], depths: Sequence[int], branches: int) -> int:
        return branches * sum(
            held_bytes(state.history.tensors()) * depth + held_bytes(state.policy.__dict__.values())
            for state, depth in zip(states, depths, strict=True)
        )


def held_bytes(values: Iterable[Any]) -> int:
    """Bytes of the memory behind all tensors among some values; views share theirs."""
    stores = [each.untyped_storage() for each in values if isinstance(each, torch.Tensor)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def read_bytes(memory: int | str | None) -> int | None:
    """Bytes of `memory`; "2GB" and "500 MiB" are read."""
    if memory is None or (isinstance(memory, int) and not isinstance(memory, bool) and memory > 0):
        return memory
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]+)\s*", str(memory), re.IGNORECASE)
    try:
        size = int(float(found[1]) * units[found[2].upper()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise AccelError(f'memory={memory!r}: give bytes above 0 or a size such as "2GB"')
    return size

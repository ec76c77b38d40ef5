"""The guidance branches of a denoiser, and what is kept for each during a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from accel.clock import StepClock
from accel.family import ENCODER, Arguments, Family
from accel.site import Branch, BranchState, Site, SiteState


class BranchStates:
    """Names a denoiser's guidance passes and holds the states of its `sites` for each.

    A branch's state begins anew when the shapes or dtypes of the call, or its prompt, change.
    """

    def __init__(self, family: Family, clock: StepClock, sites: list[Site]) -> None:
        self.family, self.clock, self.sites = family, clock, sites
        self._states: dict[tuple[str, int], BranchState] = {}
        self._context: str | None = None
        self._calls: dict[str | None, int] = {}
        self._call_step: tuple[int, int | None] = (-1, None)

    def clear(self) -> None:
        """Drop every branch's state."""
        self._states.clear()

    def tensors(self) -> Iterator[Any]:
        """Whatever the states hold; some of it may be no tensor."""
        for state in self._states.values():
            for site in state.sites:
                yield from site.history.tensors()
                yield from vars(site.policy).values()

    @contextlib.contextmanager
    def cache_context(
        self, original: Callable[..., Any], name: str, **kwargs: Any
    ) -> Iterator[None]:
        """Stands for the denoiser's own `cache_context`, by which pipelines name a pass."""
        outer, self._context = self._context, name
        try:
            with original(name, **kwargs):
                yield
        finally:
            self._context = outer

    def called(self) -> Branch:
        """Which guidance pass this call is: the pipeline's own name for it, or its ordinal."""
        now = (self.clock.run, self.clock.step)
        if now != self._call_step:
            self._call_step, self._calls = now, {}
        ordinal = sum(self._calls.values())
        repeat = self._calls.get(self._context, 0)
        self._calls[self._context] = repeat + 1
        if self._context is not None:
            return Branch(self._context + (f"#{repeat}" if repeat else ""), ordinal)
        names = ("batched",) if self.family.guidance == "batched" else ("cond", "uncond")
        return Branch(names[ordinal] if ordinal < len(names) else f"call{ordinal}", ordinal)

    def state(self, arguments: Arguments, branch: Branch) -> BranchState:
        """The branch's state, new if the call is not like the one before."""
        signature = tuple(
            _describe(value)
            for value in (*arguments.args, *sorted(arguments.kwargs.items(), key=lambda kv: kv[0]))
        )
        condition = arguments.get(ENCODER)
        key = (branch.name, branch.ordinal)
        state = self._states.get(key)
        if state is None or state.signature != signature or not _same(state.condition, condition):
            total = self.clock.total
            sites = [SiteState(site.policy(branch), site.reuse.start(total)) for site in self.sites]
            state = self._states[key] = BranchState(branch, signature, condition, sites)
        state.condition = condition
        return state


def _describe(value: Any) -> Any:
    """What must stay the same from step to step for cached tensors to stay usable."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return (value[0], _describe(value[1]))
    if isinstance(value, list | tuple):
        return len(value)
    return type(value)


def _same(old: Any, new: Any) -> bool:
    """Whether two prompt embeddings are equal; free while the pipeline passes one memory along."""
    if old is new or not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return True
    return same_memory(old, new) or bool(torch.equal(old, new))


def same_memory(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether both are views of the same memory; `old` keeps it from being used anew."""
    return old is new or (
        old.data_ptr() == new.data_ptr()
        and old.dtype == new.dtype
        and old.shape == new.shape
        and old.stride() == new.stride()
    )

"""A pipeline's denoiser seen through its family, and the spans of it that a run skips."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accel.block_calls import call_block
from accel.branch_states import BranchStates
from accel.chain import Chain, parameters
from accel.clock import StepClock
from accel.family import Arguments, Family
from accel.geometry import Grid, token_grid
from accel.guard import Guard
from accel.hooks import is_compiled_whole, override
from accel.memory_budget import Budget, held_bytes
from accel.method import AccelError, Handle
from accel.model_calls import call_model, predictions
from accel.report import StepRow
from accel.site import (
    Approximator,
    Branch,
    Forward,
    Policy,
    Site,
)

_ADAPTER_METHODS = [
    "load_lora_adapter",
    "unload_lora",
    "set_adapters",
    "set_adapter",
    "add_adapter",
    "delete_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "fuse_lora",
    "unfuse_lora",
]


@dataclass
class _Hooked:
    """What calls a site inside a block: how it is put in place, and how it goes."""

    hook: Callable[[], Callable[[], None]]
    undo: Callable[[], None]


class Denoiser:
    """One denoiser of a patched pipeline.

    `name` is its component name, `family` what we know of its class, `chain` its blocks in calling
    order. Methods add sites with `cache`; the state of a run is kept per guidance branch and is
    dropped when a new run begins or when shapes, dtypes, prompts or adapters change.
    """

    def __init__(self, name: str, module: Any, family: Family, clock: StepClock) -> None:
        self.name, self.module, self.family, self.clock = name, module, family, clock
        self.chain = Chain(module, family)
        self.rows: list[StepRow] = []
        self.memory_bytes = 0
        self.reported = 0
        """The run that `rows` and `memory_bytes` tell of: the last that called the denoiser."""
        self._between: Callable[..., Any] | None = None
        self.outside: Callable[..., Any] | None = None
        """`outside(call, args, kwargs)` stands before everything else: stages change sizes."""
        self.budget: Budget | None = None
        self.first_call: Callable[[int, Any], None] = lambda latents, timestep: None
        """Called at a run's first step with the number of latent values of one sample, and t."""
        self._grid: tuple[Callable[[], Arguments | None], Grid | None] = (lambda: None, None)
        self.guard: Guard | None = None
        self.names = parameters(module)
        self.forgetting: list[Callable[[], Any]] = []
        """Called whenever what a run has gathered is dropped."""
        self._followers = 0
        self.sites: list[Site] = []
        """Everything that may be skipped; their states lie in the same order."""
        self._branches = BranchStates(family, clock, self.sites)
        self.forward: Forward | None = None
        """The call in flight."""
        self.studying = False
        """Whether a call is in flight that the chain alone watches."""
        self._undo: Callable[[], None] | None = None
        self._block_undo: list[Callable[[], None]] = []
        self._layers: list[_Hooked] = []

    # --- attaching -----------------------------------------------------------------------------

    def cache(
        self,
        policy: Callable[[Branch], Policy],
        reuse: Approximator,
        start: int = 0,
        stop: int | None = None,
        method: str = "this method",
        keeps_output: bool = False,
    ) -> Handle:
        """Let `policy` skip blocks [start, stop) of the chain; `reuse` stands in for them.

        `stop` counts from the end when negative or 0 (0 is the end). `keeps_output`: see `Site`.
        Raises `AccelError` when the denoiser has no such chain.
        """
        count = len(self.chain.blocks)
        if count < 2:
            raise AccelError(
                f"{method} needs a chain of transformer blocks; {type(self.module).__name__} has "
                "none that is known. EasyCache and PlainCycle work on any denoiser"
            )
        if is_compiled_whole(self.module):
            raise AccelError(
                f"{method} skips blocks, but {self.name} was compiled as a whole; use "
                f"pipe.{self.name}.compile_repeated_blocks() instead, or EasyCache"
            )
        end = count if stop is None else stop if stop > 0 else count + stop
        if not 0 <= start < end <= count:
            raise AccelError(
                f"{method}: blocks [{start}, {end}) are not a part of the {count} blocks of "
                f"{type(self.module).__name__}"
            )
        return self.add(Site(start, end, policy, reuse, keeps_output))

    def cache_model(self, policy: Callable[[Branch], Policy], reuse: Approximator) -> Handle:
        """Let `policy` skip whole calls of the denoiser; the residual is output minus latent."""
        if any(site.stop is None for site in self.sites):
            raise AccelError(f"two methods would skip whole calls of {self.name}; use one")
        return self.add(Site(0, None, policy, reuse))

    def cache_widest(
        self,
        policy: Callable[[Branch], Policy],
        reuse: Approximator,
        method: str,
        whole: bool = False,
    ) -> Handle:
        """Let `policy` skip the whole block chain, or whole calls if `whole` or without a chain."""
        if self.chain.blocks and not whole:
            return self.cache(policy, reuse, method=method)
        return self.cache_model(policy, reuse)

    def skip_spans(self, method: str) -> list[tuple[int, int]]:
        """Blocks [start, stop) that each skip connection goes round, outermost first; or raise."""
        spans = self.family.spans(self.module) if self.family.spans else []
        if not self.chain.blocks or not spans:
            raise AccelError(
                f"{method} needs a U-Net with skip connections; {type(self.module).__name__} has "
                "none that are known"
            )
        return spans

    def grid(self, arguments: Arguments) -> Grid | None:
        """(frames, rows, columns) of a call's tokens; None where those of a stage form no grid."""
        run = self.clock.staging
        if run is not None and run.layout is not None and run.layout.grid is None:
            return None
        seen, grid = self._grid
        if seen() is not arguments:  # families may read it from tensors: once a call
            grid = token_grid(self.module, self.family, arguments)
            self._grid = weakref.ref(arguments), grid
        return grid

    def need_transformer(self, method: str) -> None:
        """Raise `AccelError` unless every block of the chain keeps its input's shape."""
        if not all(self.chain.keeps_shape(index) for index in range(len(self.chain.blocks))):
            raise AccelError(
                f"{method} needs a transformer; the layers of {type(self.module).__name__} change "
                "the shape of the hidden states"
            )

    def add(self, site: Site, hook: Callable[[], Callable[[], None]] | None = None) -> Handle:
        """Let a site act; `hook` puts in place what calls it, and returns the undo.

        When LoRAs come and go, which exchanges layers, it is called again.
        """
        self.sites.append(site)
        handles = [Handle(lambda: self._drop(site))]
        try:
            self._hook()
            if hook is not None:
                hooked = _Hooked(hook, hook())
                self._layers.append(hooked)
                handles.append(Handle(partial(self._unhook_layer, hooked)))
        except BaseException:
            self._drop(site)
            raise
        return Handle.together(handles)

    def follow(self, hook: Callable[[], Callable[[], None]]) -> Handle:
        """Let something else see `forward`, the call in flight; `hook` returns its undo."""
        self._followers += 1

        def drop() -> None:
            self._followers -= 1
            self._unhook()

        handles = [Handle(drop)]
        try:
            self._hook()
            handles.append(Handle(hook()))
        except BaseException:
            drop()
            raise
        return Handle.together(handles)

    def between(self, call: Callable[..., Any], method: str) -> Handle:
        """Let `call(run, args, kwargs)` stand between the pipeline and the denoiser's branches.

        `run(branch, args, kwargs)` really calls; with branch None its name is found as usual.
        """
        if self._between is not None:
            raise AccelError(f"{method} decides which branches run, and so does another method")

        def hook() -> Callable[[], None]:
            self._between = call

            def undo() -> None:
                self._between = None

            return undo

        return self.follow(hook)

    def when_forgetting(self, call: Callable[[], Any]) -> Handle:
        """Let `call()` be made whenever what a run has gathered is dropped, also at its end."""
        self.forgetting.append(call)
        return Handle(lambda: self.forgetting.remove(call))

    def number(self, site: Site) -> int:
        """The place of a site's state in `BranchState.sites`."""
        return next(number for number, each in enumerate(self.sites) if each is site)

    def _unhook_layer(self, hooked: _Hooked) -> None:
        self._layers = [each for each in self._layers if each is not hooked]
        hooked.undo()

    def _drop(self, site: Site) -> None:
        del self.sites[self.number(site)]
        self.forget()
        self._unhook()

    def _unhook(self) -> None:
        if not self.skips_blocks:
            while self._block_undo:
                self._block_undo.pop()()
        if not self.sites and not self._followers and self._undo is not None:
            self._undo()
            self._undo = None

    @property
    def skips_blocks(self) -> bool:
        """Whether any site is a range of blocks."""
        return any(site.stop for site in self.sites)

    def _hook(self) -> None:
        """Override what the sites need: the denoiser, and its blocks when a site is a range."""
        if self._undo is None:
            changed = {name: self._adapters_changed for name in _ADAPTER_METHODS}
            calls = {"__call__": self._call, "cache_context": self._branches.cache_context}
            self._undo = override(self.module, {**calls, **changed})
        if self.skips_blocks and not self._block_undo:
            for index, block in enumerate(self.chain.blocks):
                undo = override(block, {"__call__": partial(call_block, self, index)})
                self._block_undo.append(undo)

    # --- run state -----------------------------------------------------------------------------

    def begin(self) -> None:
        """A new run: nothing of the last one may be used."""
        self.forget()

    def forget(self) -> None:
        """Drop every cached tensor and every policy's state."""
        self._branches.clear()
        self.forward = None
        self.chain.forget()
        for each in self.forgetting:
            each()

    def _adapters_changed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.forget()
        layers, self._layers = self._layers, []  # one of these methods calls another
        for layer in reversed(layers):
            layer.undo()
        try:
            return original(*args, **kwargs)
        finally:
            for layer in layers:
                layer.undo = layer.hook()
            self._layers = layers

    # --- a denoiser call -----------------------------------------------------------------------

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.clock.step is None:
            return original(*args, **kwargs)
        if self.reported != self.clock.run:
            self.reported, self.rows, self.memory_bytes = self.clock.run, [], 0
        if self.clock.step == 0:
            arguments = Arguments(self.names, args, kwargs)
            latent = arguments.get(self.family.latent)
            self.first_call(latent[0].numel(), arguments.get("timestep"))
        if self.skips_blocks and not self.chain.studied:
            self._study(partial(original, *args, **kwargs))
        run = partial(self._run_branch, original)
        call = partial(self._between, run) if self._between is not None else partial(run, None)
        return call(args, kwargs) if self.outside is None else self.outside(call, args, kwargs)

    def _study(self, run: Callable[[], Any]) -> None:
        """Let the chain see one call first: sites of unknown streams would miss a step of the run.

        Once in the life of a patch, and only where structure is all that is known of a model.
        """
        self.studying = True
        try:
            run()
        finally:
            self.studying = False
            self.chain.studied = True
            self.chain.forget()

    def _run_branch(
        self,
        original: Callable[..., Any],
        branch: Branch | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One guidance pass: `branch`, or what the order of calls says."""
        clock = self.clock
        assert clock.step is not None  # called during a run only
        arguments = Arguments(self.names, args, kwargs)
        state = self._branches.state(arguments, branch or self._branches.called())
        first = state.last is None
        returning = state.last is not None and clock.step - state.last > 1
        forward = Forward(state, clock.step, clock.total, clock.place, clock, arguments, returning)
        state.last = clock.step
        run = partial(original, *args, **kwargs)
        began = time.perf_counter()
        output = self._run_forward(forward, run)
        if self.guard is not None:
            key = (self.name, state.branch.name, state.branch.ordinal)
            stand_in = forward.verdict != "computed"
            if stand_in and not self.guard.trusts(key, predictions(output)[0], clock.step):
                forward = replace(
                    forward, returning=True, blocks=0, blocks_run=0, skipping=set(), inputs={}
                )
                forward.verdict = "computed"
                output = self._run_forward(forward, run)
            if forward.verdict == "computed":
                self.guard.computed(key, predictions(output)[0])
        if branch is not None and branch.name == "batched":
            forward.blocks, forward.blocks_run = 2 * forward.blocks, 2 * forward.blocks_run
        self._record(forward, time.perf_counter() - began, first)
        return output

    def _run_forward(self, forward: Forward, run: Callable[[], Any]) -> Any:
        self.forward = forward
        try:
            return call_model(self, forward, forward.arguments, run)
        finally:
            self.forward = None

    def _record(self, forward: Forward, seconds: float, first: bool) -> None:
        """Note a call, the first of its branch's state or a later one."""
        if first and self.budget is not None:
            apart = self.family.guidance == "sequential" or self._between is not None
            self.budget.apply(self.name, forward, self.sites, 2 if apart else 1)
        self.memory_bytes = max(self.memory_bytes, held_bytes(self._branches.tensors()))
        self.rows.append(
            StepRow(
                denoiser=self.name,
                branch=forward.state.branch.name,
                step=forward.step,
                verdict=forward.verdict,
                seconds=seconds,
                blocks_run=forward.blocks_run,
                blocks=forward.blocks or max(len(self.chain.blocks), 1),
                called=forward.blocks > 0,
            )
        )

"""A pipeline's denoiser seen through its family, and the spans of it that a run skips."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from accel.clock import StepClock
from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack
from accel.hooks import is_compiled_whole, override
from accel.method import AccelError, Handle
from accel.report import StepRow
from accel.site import (
    Approximator,
    Branch,
    BranchState,
    Computed,
    Forward,
    Policy,
    Site,
    SiteState,
    Streams,
    add,
    mean_change,
    residual,
)

logger = logging.getLogger(__name__)

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


class Denoiser:
    """One denoiser of a patched pipeline.

    `name` is its component name, `family` what we know of its class, `blocks` its chain in calling
    order. Methods add sites with `cache`; the state of a run is kept per guidance branch and is
    dropped when a new run begins or when shapes, dtypes, prompts or adapters change.
    """

    def __init__(self, name: str, module: Any, family: Family, clock: StepClock) -> None:
        self.name, self.module, self.family, self.clock = name, module, family, clock
        chain = family.chain(module)
        self.blocks: list[Any] = [block for block, _ in chain]
        self.rows: list[StepRow] = []
        self.memory_bytes = 0
        self.first_call: Callable[[], None] = lambda: None
        self._stacks: list[Stack] = [stack for _, stack in chain]
        self._block_names = [_parameters(block) for block in self.blocks]
        self._names = _parameters(module)
        self._streams: tuple[str, ...] = _streams(self._stacks)
        self._sites: list[Site] = []
        self._branches: dict[tuple[str, int], BranchState] = {}
        self._context: str | None = None
        self._calls: dict[str | None, int] = {}
        self._call_step: tuple[int, int | None] = (-1, None)
        self._forward: Forward | None = None
        self._learned: dict[str, tuple[str, ...]] = {}
        self._last_outputs: tuple[str, tuple[Any, ...]] | None = None
        self._warned = False
        self._undo: list[Callable[[], None]] = []

    # --- attaching -----------------------------------------------------------------------------

    def cache(
        self,
        policy: Callable[[Branch], Policy],
        reuse: Approximator,
        start: int = 0,
        stop: int | None = None,
        method: str = "this method",
    ) -> Handle:
        """Let `policy` skip blocks [start, stop) of the chain; `reuse` stands in for them.

        `stop` counts from the end when negative or 0 (0 is the end). Raises `AccelError` when the
        denoiser has no such chain.
        """
        count = len(self.blocks)
        if count < 2:
            raise AccelError(
                f"{method} needs a chain of transformer blocks; {type(self.module).__name__} has "
                "none. EasyCache and PlainCycle work on any denoiser"
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
        return self._add(Site(start, end, policy, reuse))

    def cache_model(self, policy: Callable[[Branch], Policy], reuse: Approximator) -> Handle:
        """Let `policy` skip whole calls of the denoiser; the residual is output minus latent."""
        return self._add(Site(0, None, policy, reuse))

    def _add(self, site: Site) -> Handle:
        if not self._undo:
            self._hook()
        self._sites.append(site)

        def undo() -> None:
            self._sites.remove(site)
            self.forget()
            if not self._sites:
                self._unhook()

        return Handle(undo)

    def _hook(self) -> None:
        changed = {name: self._adapters_changed for name in _ADAPTER_METHODS}
        overrides = {"__call__": self._call, "cache_context": self._cache_context, **changed}
        self._undo.append(override(self.module, overrides))
        for index, block in enumerate(self.blocks):
            self._undo.append(override(block, {"__call__": partial(self._block, index)}))

    def _unhook(self) -> None:
        while self._undo:
            self._undo.pop()()

    # --- run state -----------------------------------------------------------------------------

    def begin(self) -> None:
        """A new run: nothing of the last one may be used, and its report is over."""
        self.forget()
        self.rows = []
        self.memory_bytes = 0

    def forget(self) -> None:
        """Drop every cached tensor and every policy's state."""
        self._branches.clear()
        self._forward = None
        self._last_outputs = None

    def _adapters_changed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return original(*args, **kwargs)

    @contextlib.contextmanager
    def _cache_context(
        self, original: Callable[..., Any], name: str, **kwargs: Any
    ) -> Iterator[None]:
        outer, self._context = self._context, name
        try:
            with original(name, **kwargs):
                yield
        finally:
            self._context = outer

    def _branch(self) -> Branch:
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

    def _state(self, arguments: Arguments) -> BranchState:
        branch = self._branch()
        signature = tuple(
            _describe(value)
            for value in (*arguments.args, *sorted(arguments.kwargs.items(), key=lambda kv: kv[0]))
        )
        condition = arguments.get(ENCODER)
        key = (branch.name, branch.ordinal)
        state = self._branches.get(key)
        if state is None or state.signature != signature or not _same(state.condition, condition):
            sites = [SiteState(site.policy(branch), site.reuse.start()) for site in self._sites]
            state = self._branches[key] = BranchState(branch, signature, condition, sites)
        state.condition = condition
        return state

    # --- a denoiser call -----------------------------------------------------------------------

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock, step = self.clock, self.clock.step
        if step is None:
            return original(*args, **kwargs)
        if step == 0:
            self.first_call()
        arguments = Arguments(self._names, args, kwargs)
        place = step + clock.schedule - clock.total
        forward = Forward(self._state(arguments), step, clock.total, place, clock.schedule)
        self._forward = forward
        began = time.perf_counter()
        try:
            run = partial(original, *args, **kwargs)
            output = self._through_model_sites(forward, arguments, run)
        finally:
            self._forward = None
        self._record(forward, time.perf_counter() - began)
        return output

    def _through_model_sites(
        self, forward: Forward, arguments: Arguments, run: Callable[[], Any]
    ) -> Any:
        index = next((i for i, site in enumerate(self._sites) if site.stop is None), None)
        if index is None:
            return self._run(forward, run)
        latent = arguments.get(self.family.latent)
        signals = _Signals(self, forward, latent)
        state = forward.state.sites[index]
        if forward.decide(index, signals):
            (value,) = state.history.predict(forward.step)
            assert value is not None  # only non-None predictions are remembered
            return state.dress(value + _latent_like(latent, value.shape).to(value.dtype))
        output = self._run(forward, run)
        prediction = output[0]
        base = _latent_like(latent, prediction.shape)
        computed = Computed((base,), (prediction,), (prediction - base,))
        forward.remember(index, signals, computed)
        state.dress = _wrapper(output)
        return output

    def _run(self, forward: Forward, run: Callable[[], Any]) -> Any:
        output = run()
        if not self.blocks:
            forward.blocks_run = 1
        return output

    def _record(self, forward: Forward, seconds: float) -> None:
        held = sum(
            tensor.numel() * tensor.element_size()
            for state in self._branches.values()
            for site in state.sites
            for tensor in site.history.tensors()
        )
        self.memory_bytes = max(self.memory_bytes, held)
        self.rows.append(
            StepRow(
                denoiser=self.name,
                branch=forward.state.branch.name,
                step=forward.step,
                verdict=forward.verdict,
                seconds=seconds,
                blocks_run=forward.blocks_run,
                blocks=max(len(self.blocks), 1),
            )
        )

    # --- a block call --------------------------------------------------------------------------

    def _block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = self._forward
        if forward is None:
            return original(*args, **kwargs)
        arguments = Arguments(self._block_names[index], args, kwargs)
        if index == 0:
            forward.entry = self._inputs(arguments)
            forward.entry_arguments, forward.entry_block = arguments, self.blocks[0]
        number, site = self._site_of(index)
        if site is None:
            forward.blocks_run += 1
            return self._learn(index, arguments, original(*args, **kwargs))
        state = forward.state.sites[number]
        if index == site.start:
            state.inputs = self._inputs(arguments)
            hidden = state.inputs[0]
            if self._outputs(index) is not None:
                forward.decide(number, _Signals(self, forward, hidden))
        assert site.stop is not None
        if number in forward.skipping:
            if index < site.stop - 1:
                return self._pack(index, self._inputs(arguments))
            like = arguments.get(HIDDEN)
            inputs = self._relayout(state.inputs, like)
            return self._pack(index, add(inputs, state.history.predict(forward.step)))
        forward.blocks_run += 1
        output = self._learn(index, arguments, original(*args, **kwargs))
        if index == site.stop - 1 and self._outputs(index) is not None:
            outputs = self._unpack(index, output)
            inputs = self._relayout(state.inputs, outputs[0])
            signals = _Signals(self, forward, state.inputs[0])
            change = residual(outputs, inputs)
            if change[0] is not None:
                forward.remember(number, signals, Computed(inputs, outputs, change))
        return output

    def _site_of(self, index: int) -> tuple[int, Site | None]:
        for number, site in enumerate(self._sites):
            if site.stop is not None and site.start <= index < site.stop:
                return number, site
        return -1, None

    def _inputs(self, arguments: Arguments) -> Streams:
        return tuple(arguments.get(name) for name in self._streams)

    def _outputs(self, index: int) -> tuple[str, ...] | None:
        stack = self._stacks[index]
        return stack.outputs or self._learned.get(stack.name)

    def _pack(self, index: int, streams: Streams) -> Any:
        """Streams in the form that block `index` returns."""
        outputs = self._outputs(index)
        assert outputs is not None
        by_name = dict(zip(self._streams, streams, strict=True))
        values = tuple(by_name[name] for name in outputs)
        return values[0] if len(values) == 1 else values

    def _unpack(self, index: int, output: Any) -> Streams:
        """What block `index` returned, as streams."""
        outputs = self._outputs(index)
        assert outputs is not None
        values = (output,) if isinstance(output, torch.Tensor) else output
        by_name = dict(zip(outputs, values, strict=False))
        return tuple(by_name.get(name) for name in self._streams)

    def _learn(self, index: int, arguments: Arguments, output: Any) -> Any:
        """For undescribed stacks: find the order of the returned streams by tensor identity."""
        stack = self._stacks[index]
        if stack.outputs is not None or stack.name in self._learned:
            return output
        values = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        previous, self._last_outputs = self._last_outputs, (stack.name, values)
        if previous is None or previous[0] != stack.name:
            return output
        order = tuple(
            next((name for name in self._streams if arguments.get(name) is value), "")
            for value in previous[1]
        )
        if HIDDEN in order and "" not in order:
            self._learned[stack.name] = order
        elif not self._warned:
            self._warned = True
            logger.warning(
                "%s: the blocks of %s do not hand their outputs on unchanged; nothing is cached",
                type(self.module).__name__,
                stack.name,
            )
        return output

    def _relayout(self, streams: Streams, like: Any) -> Streams:
        """Streams recorded at a span's first block, in the layout of its last block."""
        if self.family.relayout is None or streams[0] is None or streams[0].shape == like.shape:
            return streams
        return (self.family.relayout(streams[0], like), *streams[1:])


class _Signals:
    """What a policy may look at; see `accel.site.Signals`."""

    def __init__(self, denoiser: Denoiser, forward: Forward, hidden: Any) -> None:
        self._denoiser, self._forward = denoiser, forward
        self.hidden = hidden

    @property
    def entry(self) -> Any:
        return self._denoiser._relayout(self._forward.entry, self.hidden)[0]

    @property
    def observed(self) -> Any:
        observer = self._denoiser.family.observer
        if observer is None:
            return self._forward.entry[0]
        return observer(self._forward.entry_block, self._forward.entry_arguments)

    def relative_change(self, new: Any, old: Any) -> float:
        return self.mean_change(new, old, old)

    def mean_change(self, new: Any, old: Any, scale: Any = None) -> float:
        parallel = getattr(self._denoiser.module, "_parallel_config", None)
        group = torch.distributed.group.WORLD if parallel is not None else None
        return mean_change(new, old, scale, group)


def _parameters(module: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _streams(stacks: list[Stack]) -> tuple[str, ...]:
    """All streams of a chain, hidden states first."""
    named = {name for stack in stacks for name in (stack.outputs or (HIDDEN, ENCODER))}
    return (HIDDEN, *sorted(named - {HIDDEN}))


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
    """Whether two prompt embeddings are equal; free while the pipeline passes one tensor along."""
    if old is new or not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return True
    return bool(torch.equal(old, new))


def _latent_like(latent: Any, shape: Any) -> Any:
    """The latent in the prediction's shape: extra channels cut off, missing ones zero.

    Image-to-video latents carry condition channels; learned-variance predictions carry more.
    """
    different = [axis for axis, size in enumerate(shape) if latent.shape[axis] != size]
    if not different:
        return latent
    result = latent.new_zeros(shape)
    if latent.dim() == len(shape) and len(different) == 1:
        axis = different[0]
        common = min(latent.shape[axis], shape[axis])
        result.narrow(axis, 0, common).copy_(latent.narrow(axis, 0, common))
    return result


def _wrapper(output: Any) -> Callable[[Any], Any]:
    """How to dress a prediction as `output` is: a tuple or a diffusers output object."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda prediction: (prediction, *rest)
    kind, field = type(output), next(iter(output.keys()))
    return lambda prediction: kind(**{field: prediction})

"""`Patch`: the methods attached to one pipeline, through its runs and to their removal."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from accel import registry
from accel.clock import StepClock
from accel.denoiser import Denoiser
from accel.geometry import first_place, log_signal_to_noise, noisiest_first, prediction_kind
from accel.guard import Guard
from accel.hooks import PATCH, call_arguments, call_length, is_compiled_whole, override, tidy
from accel.memory_budget import Budget
from accel.method import AccelError, Handle, Method
from accel.recipe import Recipe, Validity
from accel.report import Report

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "transformer_2", "unet")
"""Components of a pipeline that are denoisers."""


class Patch:
    """What `patch` returns: the methods attached to one pipeline, and their removal."""

    def __init__(
        self,
        pipe: Any,
        methods: tuple[Method, ...],
        budget: Budget | None = None,
        valid_for: Validity | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._pipe = pipe
        self._budget = budget
        self._valid_for = valid_for or Validity()
        self._guard = guard
        self._aside: tuple[Method, ...] = ()
        """The methods of a recipe that does not hold for the run in progress."""
        self._clock = StepClock()
        self._lock = threading.RLock()
        self._undo: list[Callable[[], None]] = []
        self._handles: list[tuple[Method, list[Handle]]] = []
        self._beside: list[Handle] = []
        self._scheduler: Any = None
        self._running = False
        self._open = contextlib.ExitStack()
        """What is open while a run lasts."""
        self._denoisers = _denoisers(pipe, self._clock)
        self.attach(methods)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, with what they measured by now."""
        return self._aside or self._attached

    @property
    def _attached(self) -> tuple[Method, ...]:
        return tuple(
            handles[0].settled() if handles[0].settled is not None else method
            for method, handles in self._handles
        )

    def report(self) -> Report:
        """The last run (or the one in progress)."""
        last = max(denoiser.reported for denoiser in self._denoisers)
        used = [denoiser for denoiser in self._denoisers if denoiser.reported == last]
        rows = sorted((row for each in used for row in each.rows), key=lambda row: row.step)
        return Report(
            methods=tuple(_describe(method) for method, _ in self._handles),
            rows=tuple(rows),
            memory_bytes=sum(denoiser.memory_bytes for denoiser in used),
            repaired=self._guard.repaired if self._guard is not None else 0,
        )

    def recipe(self) -> Recipe:
        """The attached methods with their measured tables and where they hold, for saving."""
        model = type(self._denoisers[0].module).__name__
        return Recipe.of(self.methods, model, self._valid_for)

    def remove(self) -> None:
        """Undo everything; calling it again does nothing."""
        self._detach_methods()
        self._aside = ()
        while self._undo:
            self._undo.pop()()
        self._release_scheduler()
        tidy(getattr(self._pipe, "scheduler", None))
        if self._pipe.__dict__.get(PATCH) is self:
            del self._pipe.__dict__[PATCH]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    # --- attaching -----------------------------------------------------------------------------

    def attach(self, methods: tuple[Method, ...]) -> None:
        """Attach to a pipeline that is not patched; all of it or, on an error, nothing."""
        try:
            self._attach(methods)
        except BaseException:
            self.remove()
            raise

    def _attach(self, methods: tuple[Method, ...]) -> None:
        self._attach_methods(methods)
        self._clock.listeners.clear()
        for denoiser in self._denoisers:
            denoiser.first_call = self._first_call
            denoiser.budget = self._budget and self._budget.shared(len(self._denoisers))
            denoiser.guard = self._guard
            self._clock.listeners.append(denoiser.begin)
        if self._guard is not None:
            self._clock.listeners.append(self._guard.begin)
        self._pipe.__dict__[PATCH] = self
        calls = {"__call__": self._run, "unfuse_lora": self._weights_changed}
        self._undo.append(override(self._pipe, calls))
        self._hold_scheduler()

    def _attach_methods(self, methods: tuple[Method, ...]) -> None:
        for method in methods:
            handles: list[Handle] = []
            self._handles.append((method, handles))
            for denoiser in self._denoisers:
                handles.append(method.attach(denoiser))
        if self._budget is None and all(method.slot != "text" for method in methods):
            self._attach_beside(registry.method("textcache")())

    def _attach_beside(self, exact: Method) -> None:
        """What costs no quality goes beside any method, on the denoisers that it is for."""
        for denoiser in self._denoisers:
            with contextlib.suppress(AccelError):
                self._beside.append(exact.attach(denoiser))

    def _detach_methods(self) -> None:
        Handle.together(self._beside).remove()
        self._beside = []
        for _, handles in reversed(self._handles):
            for handle in handles:
                handle.remove()
        self._handles = []

    def _stay_valid(self, **known: Any) -> None:
        """Let an online method run where the recipe does not hold, and the recipe where it does."""
        reason = self._valid_for.refuses(**known)
        if reason is not None and not self._aside:
            aside = self._attached
            online = registry.method("easycache")()
            logger.warning("the recipe is not used for this run: %s; using %s", reason, online)
            self._detach_methods()
            self._attach_methods((online,))
            self._aside = aside
        elif reason is None and self._aside and "steps" in known:
            self._detach_methods()
            self._attach_methods(self._aside)
            self._aside = ()

    def _hold_scheduler(self) -> None:
        """Follow the pipeline's scheduler of now; users swap it between runs."""
        scheduler = self._pipe.scheduler
        if scheduler is self._scheduler:
            return
        self._release_scheduler()
        noising = {name: self._noised for name in ("add_noise", "scale_noise")}
        steps = {"set_timesteps": self._set_timesteps, "step": self._step}
        undo = override(scheduler, {**steps, **noising})
        self._scheduler, self._release = scheduler, undo

    def _release_scheduler(self) -> None:
        if self._scheduler is not None:
            self._release()
        self._scheduler = None

    # --- a run ---------------------------------------------------------------------------------

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._hold_denoisers()
            self._hold_scheduler()
            self._running = True
            self._clock.call = call_arguments(original, args, kwargs)
            measuring = any(getattr(each, "unmeasured", False) for each in self._attached)
            try:
                with contextlib.ExitStack() as self._open:
                    result = original(*args, **kwargs)
                if not measuring:
                    self._say_when_idle()
                return result
            finally:
                self._running = False
                self._clock.end()
                for denoiser in self._denoisers:
                    denoiser.forget()
                if self._guard is not None:
                    self._guard.forget()

    def _say_when_idle(self) -> None:
        """A run in which a cache never acted is said loudly."""
        watched = any(denoiser.sites for denoiser in self._denoisers)
        if not watched or self.report().share_computed < 1.0:
            return
        names = ", ".join(_describe(method) for method, _ in self._handles)
        if self._clock.step == 0:
            logger.warning(
                "nothing can be saved on %s: it never steps its own scheduler (diffusion forcing "
                "steps copies of it), so %s saw no steps",
                type(self._pipe).__name__,
                names,
            )
        else:
            logger.warning(
                "nothing was saved in this run: %s computed every step; a larger threshold, share "
                "or interval saves more",
                names,
            )

    def _weights_changed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of its ways to change a LoRA, the pipeline's alone asks no denoiser."""
        for denoiser in self._denoisers:
            denoiser.forget()
        return original(*args, **kwargs)

    def _hold_denoisers(self) -> None:
        """Follow the pipeline's denoisers of now; users exchange and compile them between runs."""
        components = self._pipe.components
        if any(components.get(each.name) is not each.module for each in self._denoisers):
            methods = self.methods
            logger.info("a denoiser was exchanged after patching; attaching again")
            self.remove()
            self._denoisers = _denoisers(self._pipe, self._clock)
            self.attach(methods)
        for each in self._denoisers:
            if each.skips_blocks and is_compiled_whole(each.module):
                logger.warning(
                    "%s was compiled as a whole after patching, which breaks its graph at every "
                    "block; compile_repeated_blocks() does not",
                    each.name,
                )

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self._running:
            count = len(self._scheduler.timesteps)
            self._stay_valid(scheduler=type(self._scheduler).__name__, steps=count)
            if self._clock.staging is not None:
                self._stage(self._clock.staging)
            timesteps = noisiest_first(self._scheduler)
            self._clock.begin(timesteps, log_signal_to_noise(self._scheduler))
            self._clock.prediction = prediction_kind(self._scheduler)
        return result

    def _stage(self, staging: Any) -> None:
        """This run is sampled in stages."""
        if staging.pipe is None:
            generator = self._clock.call.get("generator")
            self._open.enter_context(staging.running(self._pipe, generator))
        staging.install(self._scheduler)

    def _noised(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Image-to-image noises the latent of its picture before the first step."""
        if self._running and self._clock.clean is None:
            self._clock.clean = args[0] if args else next(iter(kwargs.values()))
        return original(*args, **kwargs)

    def _first_call(self, latents: int, timestep: Any) -> None:
        total = call_length(self._pipe, self._clock.schedule)
        start = first_place(self._scheduler, total, timestep)
        if self._clock.staging is None:  # stages have begun already
            made = self._clock.log_snr[start : start + total]
            self._stay_valid(latents=latents, levels=made)
        self._clock.shorten(total, start)
        said = getattr(self._pipe, "do_classifier_free_guidance", None)
        scale = self._clock.call.get("guidance_scale")
        if isinstance(scale, int | float):  # some say nothing (PixArt), or always no (Panorama)
            said = False if scale <= 1 else said or None
        self._clock.guided = said

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._running and self._clock.staging is not None:
            result = self._clock.staging.advance(self._scheduler, original, args, kwargs)
        else:
            result = original(*args, **kwargs)
        self._clock.advance()
        return result


def _denoisers(pipe: Any, clock: StepClock) -> list[Denoiser]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise AccelError(f"{type(pipe).__name__} is not a diffusers pipeline")
    found = [(name, components[name]) for name in DENOISERS if components.get(name) is not None]
    if not found or getattr(pipe, "scheduler", None) is None:
        raise AccelError(
            f"{type(pipe).__name__} has no denoiser with a scheduler: looked for "
            f"{', '.join(DENOISERS)} among {', '.join(components) or 'no components'}"
        )
    return [Denoiser(name, module, registry.family(module), clock) for name, module in found]


def _describe(method: Method) -> str:
    return type(method).__name__

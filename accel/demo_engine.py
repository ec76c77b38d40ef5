"""The demo's work: one generation at a time, in a thread that can be watched and stopped.

Knows no web page: `Engine.start` gives a `Run`, whose iteration yields what a page shows.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import accel
from accel import generate, loading
from accel.generate import Job
from accel.loading import Loading
from accel.method import AccelError
from accel.recipe import Recipe
from accel.report import Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for. `recipe` None stands for the best known one."""

    job: Job
    recipe: Recipe | None = None
    compare: bool = True


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` of `total` done in `stage`, `report` of the patched run so far."""

    stage: str
    step: int = 0
    total: int = 0
    report: Report | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run made. Seconds are of one run each; `untouched` is None without a comparison."""

    wish: Wish
    fast: Frames
    untouched: Frames | None
    fps: int
    total: int
    report: Report
    recipe: Recipe
    seconds: float
    untouched_seconds: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    feature_distance: float | None = None

    @property
    def speedup(self) -> float | None:
        """Untouched seconds over patched seconds of this one pair."""
        return None if self.untouched_seconds is None else self.untouched_seconds / self.seconds


class Stopped(BaseException):
    """Raised inside a run at the first step after `Run.stop`; no `except Exception` keeps it."""


class Run:
    """One generation in a thread of its own. Iterate for its `Progress` and last its `Outcome`."""

    def __init__(self, work: Callable[[Run], Outcome]) -> None:
        self.last = Progress("waiting")
        self.outcome: Outcome | None = None
        self._work = work
        self._stop = threading.Event()
        self._news: queue.SimpleQueue[Progress | Outcome | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._labour, daemon=True)
        self._thread.start()

    def tell(self, progress: Progress) -> None:
        """From inside the work: where it stands; raises `Stopped` when it shall end."""
        if self._stop.is_set():
            raise Stopped
        self.last = progress
        self._news.put(progress)

    def stop(self) -> None:
        """End the work at its next step and wait until everything is cleaned up."""
        self._stop.set()
        self._thread.join()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked it to stop."""
        return self._stop.is_set()

    def __iter__(self) -> Iterator[Progress | Outcome]:
        """Ends after the outcome, or without one when stopped; raises what the work raised."""
        try:
            while True:
                news = self._news.get()
                if isinstance(news, Stopped):
                    return
                if isinstance(news, BaseException):
                    raise news
                yield news
                if isinstance(news, Outcome):
                    return
        finally:
            self.stop()

    def _labour(self) -> None:
        try:
            self.outcome = self._work(self)
            self._news.put(self.outcome)
        except BaseException as error:
            self._news.put(error)


class Engine:
    """Holds one pipeline at a time and makes what visitors wish, one after the other."""

    def __init__(self, options: Loading | None = None) -> None:
        self._options = options or Loading()
        self._lock = threading.Lock()
        self._name, self._warm = "", False
        self._loaded: tuple[Any, dict[str, Any], int | None] | None = None

    def start(self, wish: Wish) -> Run:
        """Begin; the run waits for one that is still going."""
        return Run(lambda run: self._make(run, wish))

    def _pipeline(self, model: str) -> tuple[Any, dict[str, Any], int | None]:
        if self._loaded is None or self._name != model:
            self._loaded, self._warm = None, False
            self._loaded = loading.load(model, self._options)
            self._name = model
        return self._loaded

    def _make(self, run: Run, wish: Wish) -> Outcome:
        with self._lock:
            run.tell(Progress("loading the model"))
            pipe, defaults, fps = self._pipeline(wish.job.model)
            call = generate.arguments(pipe, defaults, wish.job)
            try:
                if not self._warm:  # the first run pays for much that later ones do not
                    run.tell(Progress("warming up"))
                    generate.make(pipe, call | {"num_inference_steps": 2}, wish.job.seed)
                    self._warm = True
                return _sample(run, wish, pipe, call, wish.job.fps or fps or 16)
            finally:
                accel.unpatch(pipe)
                pipe.maybe_free_model_hooks()  # a stopped run leaves offloaded parts on the device


def _sample(run: Run, wish: Wish, pipe: Any, call: dict[str, Any], fps: int) -> Outcome:
    total = call.get("num_inference_steps", 50)

    def make(stage: str, report: Callable[[], Report] | None = None) -> tuple[Frames, float]:
        def stepped(step: int) -> None:
            run.tell(Progress(stage, step, total, report() if report else None))

        stepped(0)
        return generate.make(pipe, call | _watching(pipe, stepped), wish.job.seed)

    recipe = wish.recipe
    if recipe is None or recipe.entries:
        recipe = generate.settle(pipe, recipe, lambda: make("measuring the model once"))
    if recipe.entries:
        with accel.patched(pipe, recipe=recipe) as patch:
            fast, seconds = make("accelerated", patch.report)
            report = patch.report()
    else:
        fast, seconds = make("untouched")
        report = Report(methods=(), rows=(), memory_bytes=0)
    made = {"wish": wish, "fast": fast, "fps": fps, "total": total, "report": report}
    made |= {"recipe": recipe, "seconds": seconds}
    if not (wish.compare and recipe.entries):
        return Outcome(untouched=None, **made)
    plain, plain_seconds = make("untouched, for comparison")
    psnr, ssim, distance = generate.quality(fast, plain)
    return Outcome(
        untouched=plain,
        untouched_seconds=plain_seconds,
        psnr=psnr,
        ssim=ssim,
        feature_distance=distance,
        **made,
    )


def _watching(pipe: Any, stepped: Callable[[int], None]) -> dict[str, Any]:
    """The arguments of a call that make the pipeline tell each step that it finished."""
    accepted = inspect.signature(pipe.__call__).parameters

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        stepped(step + 1)
        return kwargs

    if "callback_on_step_end" in accepted:
        return {"callback_on_step_end": on_step_end}
    if "callback" in accepted and "callback_steps" in accepted:
        return {"callback": lambda step, *_: stepped(step + 1), "callback_steps": 1}
    raise AccelError(f"{type(pipe).__name__} tells nobody of its steps, so it cannot be stopped")

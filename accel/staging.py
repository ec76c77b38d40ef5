"""Sampling in stages of different size, without re-typing any pipeline's loop.

The pipeline keeps its full-size latents. Only a live part of them is real: the denoiser is called
with that part alone, its prediction is repeated to full size, and the scheduler's step sees the
live part again. Between steps the pipeline and the user's callbacks hold the live part repeated to
full size. When the scheduler is given its timesteps, they are replaced by those of all stages; at
the last step of a stage the method says how the live part crosses to the next one.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from accel import staged_scheduler
from accel.crossing import Crossing
from accel.family import Arguments
from accel.geometry import predicted
from accel.hooks import override
from accel.layout import Form, Layout
from accel.method import AccelError, Handle
from accel.model_calls import dressed
from accel.noise_levels import NoiseLevels
from accel.stages import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser
    from accel.geometry import Grid

_CONTROLS = ("controlnet", "additional_residual")


class StagedSampler(Protocol):
    """A method whose run is made of stages."""

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """The stages of a run that has `levels`; together they have as many steps."""
        ...

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """The next stage's layout and its noisy latent."""
        ...


def stage(
    denoiser: Denoiser, method: StagedSampler, positions: str = "native", noise: str = "initial"
) -> Handle:
    """Let `method` sample in stages on this denoiser; a pipeline's denoisers share one run.

    `noise` of a stage that is not the first: "initial", the part of the run's first latent that
    belongs to its places, so that stages draw the same picture; or "fresh".
    """
    name = type(method).__name__
    if denoiser.family.resized is None:
        raise AccelError(
            f"{name}: how {type(denoiser.module).__name__} takes another size than its pipeline's "
            "is not known; its Family needs `resized`"
        )
    clock = denoiser.clock
    if clock.staging is None:
        clock.staging = StagedRun(method, name, positions, noise)
    run = clock.staging
    run.denoisers.append(denoiser)

    def hook() -> Callable[[], None]:
        denoiser.outside = lambda call, args, kwargs: run.call(denoiser, call, args, kwargs)

        def undo() -> None:
            denoiser.outside = None
            run.denoisers.remove(denoiser)
            if not run.denoisers:
                clock.staging = None

        return undo

    return denoiser.follow(hook)


@dataclass
class StagedRun:
    """The stages of one pipeline's run, shared by its denoisers and its scheduler."""

    method: StagedSampler
    name: str
    positions: str = "native"
    noise: str = "initial"
    denoisers: list[Denoiser] = field(default_factory=list)
    levels: NoiseLevels | None = None
    stages: list[Stage] = field(default_factory=list)
    step: int = 0
    layout: Layout | None = None
    form: Form | None = None
    pipe: Any = None
    generator: Any = None
    white: Any = None
    """The run's first latent, at variance 1."""
    deciding: bool = False
    """Whether the VAE decodes for the method itself, not for the user."""
    _undo: Callable[[], None] = lambda: None
    _history: dict[str, Any] = field(default_factory=dict)
    _patches: tuple[int, int] = (1, 1)
    _full: Grid = (1, 1, 1)
    _unit: float = 1.0

    # --- a run begins --------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, pipe: Any, generator: Any) -> Iterator[None]:
        """Around a pipeline's call; a method that changes what is decoded does so inside."""
        self.pipe, self.generator = pipe, generator
        decode = getattr(self.method, "decode", None)
        vae = getattr(pipe, "vae", None)
        if decode is not None and vae is not None:
            self._undo = override(vae, {"decode": lambda *a, **k: decode(self, *a, **k)})
        try:
            yield
        finally:
            self._undo()
            self.pipe = self.generator = self.layout = self.white = None

    def install(self, scheduler: Any) -> None:
        """The scheduler has its timesteps: put those of all stages in their place."""
        levels = NoiseLevels.of(scheduler)
        stages = self.method.stages(levels)
        if [each.scale for each in stages][-1] != 1:
            raise AccelError(f"{self.name}: the last stage must have the full size")
        self.levels, self.stages, self.step = levels, stages, 0
        self.layout = None
        self._unit = float(getattr(scheduler, "init_noise_sigma", 1.0))
        if len(stages) > 1:
            staged_scheduler.install(scheduler, levels, stages)
        self._history = staged_scheduler.history(scheduler)

    @property
    def place(self) -> tuple[int, int]:
        """Number of the stage of the step in progress, and of the step within it."""
        step = self.step
        for number, each in enumerate(self.stages):
            if step < len(each.sigmas) - 1:
                return number, step
            step -= len(each.sigmas) - 1
        raise AccelError(f"{self.name}: the run makes more steps than the scheduler was told")

    def grid(self, scale: float) -> Grid:
        """The full grid scaled; raises when a side would not be whole."""
        frames, *sides = self._full
        for side, patch in zip(sides, self._patches, strict=True):
            small = side * scale
            if abs(small - round(small)) > 1e-6 or round(small) % patch or round(small) < patch:
                accepted = f" and divisible by {patch}" if patch > 1 else ""
                raise AccelError(
                    f"{self.name}: {side} × {scale:g} of the latent's {sides[0]}×{sides[1]} places "
                    f"is {small:g}, which must be whole{accepted}; take another size or scale"
                )
        return (frames, round(sides[0] * scale), round(sides[1] * scale))

    # --- a denoiser call -----------------------------------------------------------------------

    def call(self, denoiser: Denoiser, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The pipeline calls the denoiser: call it with the live part."""
        arguments = Arguments(denoiser.names, args, kwargs)
        if self.layout is None:
            self._begin(denoiser, arguments)
        assert self.layout is not None  # made just now
        assert self.form is not None
        if self.layout.whole:
            return call(args, kwargs)
        family = denoiser.family
        assert family.resized is not None  # asked when attaching
        latent = self._live(arguments.get(family.latent), denoiser)
        changed = {family.latent: latent, **family.resized(arguments, self.layout)}
        output = call(*_replaced(arguments, changed))
        return dressed(output)(self.form.put(output[0], self.layout))

    def _live(self, latent: Tensor, denoiser: Denoiser) -> Tensor:
        """The live part of a denoiser's input; at first each place has the noise of its own area.

        Channels beyond those that the denoiser predicts are conditions, without noise.
        """
        assert self.layout is not None
        assert self.form is not None
        if self.step:
            return self.form.take(latent, self.layout)
        axis, count = predicted(denoiser.module, denoiser.family, latent)
        noise, conditions = latent.tensor_split((count,), axis)
        parts = self.form.pooled(noise, self.layout), self.form.take(conditions, self.layout)
        return torch.cat(parts, axis)

    def _begin(self, denoiser: Denoiser, arguments: Arguments) -> None:
        """The first call of a run: now the sizes are known."""
        clock, family = denoiser.clock, denoiser.family
        if clock.total != clock.schedule:
            raise AccelError(
                f"{self.name}: this run makes a part of its schedule alone (image-to-image, "
                "denoising_end); staged sampling starts from noise and goes to the end"
            )
        for name, value in arguments.kwargs.items():
            if any(part in name for part in _CONTROLS) and value is not None:
                raise AccelError(f"{self.name}: {name} has the full size and cannot be resized")
        timestep = arguments.get("timestep")
        if isinstance(timestep, torch.Tensor) and timestep.dim() > 1:
            raise AccelError(
                f"{self.name}: this pipeline gives each token its own timestep (a first frame that "
                "is held fixed), which stages do not"
            )
        latent = arguments.get(family.latent)
        self.form = Form.of(family, latent)
        self._full = self.form.grid(denoiser.module, family, arguments)
        if self.form.packed and latent.shape[1] != math.prod(self._full):
            raise AccelError(
                f"{self.name}: this pipeline appends {latent.shape[1] - math.prod(self._full)} "
                "tokens of a reference picture to the latent, which stages do not resize"
            )
        self._patches = _patches(denoiser, self.form)
        for each in self.stages:
            self.grid(each.scale)
        first = self.grid(self.stages[0].scale)
        self.layout = Layout.resized(self._full, first, self.positions)

    # --- a scheduler's step --------------------------------------------------------------------

    def advance(self, scheduler: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One step of the live part; the last of a stage crosses to the next one."""
        names = list(inspect.signature(original).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        output, sample = given.pop("model_output"), given.pop("sample")
        layout, form = self.layout, self.form
        if layout is None or form is None or self.levels is None:
            raise AccelError(f"{self.name}: the scheduler makes a step before the denoiser's call")
        if len(self.stages) == 1:
            return original(*args, **kwargs)
        number, inside = self.place
        live_output, live = form.take(output, layout), form.take(sample, layout)
        if self.step == 0:
            self.white, live = sample / self._unit, form.pooled(sample, layout)
        now = self.stages[number]
        with staged_scheduler.local(scheduler, self.levels, now, inside, self.step):
            result = original(model_output=live_output, sample=live, **given)
        noisy = result[0]
        if inside == len(now.sigmas) - 2 and number + 1 < len(self.stages):
            clean = self.levels.clean(live, live_output, now.sigmas[inside])
            crossing = Crossing(
                number + 1,
                self.levels,
                now,
                self.stages[number + 1],
                layout,
                form,
                clean,
                noisy,
                self,
            )
            layout, noisy = self.method.cross(crossing)
            self.layout = layout
            self._forget(scheduler)
        self.step += 1
        return dressed(result)(form.put(noisy.to(sample.dtype), layout))

    def _forget(self, scheduler: Any) -> None:
        """A stage begins: solver histories and everything that is cached are of another size."""
        staged_scheduler.recall(scheduler, self._history)
        for denoiser in self.denoisers:
            denoiser.forget()


def _replaced(
    arguments: Arguments, changed: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with some of them changed."""
    args, kwargs = list(arguments.args), dict(arguments.kwargs)
    for name, value in changed.items():
        place = arguments.names.index(name) if name in arguments.names else len(args)
        if name in kwargs or place >= len(args):
            kwargs[name] = value
        else:
            args[place] = value
    return tuple(args), kwargs


def _patches(denoiser: Denoiser, form: Form) -> tuple[int, int]:
    """What rows and columns of places must be divisible by."""
    if form.packed:
        return (1, 1)
    module = denoiser.module
    if hasattr(module, "down_blocks"):
        halvings = 2 ** (len(module.down_blocks) - 1)
        return (halvings, halvings)
    patch = getattr(module.config, "patch_size", None) or 1
    return (patch, patch) if isinstance(patch, int) else (patch[-2], patch[-1])

"""Sampling in stages of different size, without re-typing any pipeline's loop.

The pipeline keeps its full-size latents. Only a live part of them is real: the denoiser is called
with that part alone, its prediction is repeated to full size, and the scheduler's step sees the
live part again. Between steps the pipeline and the user's callbacks hold the live part repeated to
full size. When the scheduler is given its timesteps, they are replaced by those of all stages; at
the last step of a stage the method says how the live part crosses to the next one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from accel.family import Arguments
from accel.hooks import override
from accel.layout import Form, Layout
from accel.method import AccelError, Handle, check, is_number
from accel.model_calls import dressed
from accel.noise_levels import NoiseLevels, Sigmas
from accel.transitions import draw_noise, renoised, repeated, resize

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser
    from accel.geometry import Grid

_HISTORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order")
_CONTROLS = ("controlnet", "additional_residual")


@dataclass(frozen=True)
class Stage:
    """`sigmas`: one level more than the stage has steps. `scale`: of rows and columns."""

    sigmas: Sigmas
    scale: float = 1.0


class StagedSampler(Protocol):
    """A method whose run is made of stages."""

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """The stages of a run that has `levels`; together they have as many steps."""
        ...

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """The next stage's layout and its noisy latent."""
        ...


@dataclass(frozen=True)
class Crossing:
    """The end of a stage: everything from which the next one starts.

    `clean` is the estimate of the data from the stage's last prediction, `noisy` the latent after
    its last step; both live, in the family's form.
    """

    index: int
    """The number of the stage that begins."""
    levels: NoiseLevels
    before: Stage
    after: Stage
    layout: Layout
    form: Form
    clean: Tensor
    noisy: Tensor
    initial: Tensor
    """The run's first, full-size latent."""
    run: StagedRun

    def grid(self, scale: float) -> Grid:
        """The grid of a stage at `scale`."""
        return self.run.grid(scale)

    def noise(self, places: int) -> Tensor:
        """White noise for so many places, (batch, …), from the call's generators."""
        shape = list(self.form.places(self.noisy).shape)
        shape[self.form.axis] = places
        return draw_noise(self.noisy, shape, self.run.generator)

    def renoise(self, planes: Tensor) -> Tensor:
        """T1: clean latent planes at the next stage's first level, with fresh noise."""
        clean = self.form.tokens(planes)
        noise = self.noise(self.form.places(clean).shape[self.form.axis])
        weights = self.levels.weights(self.after.sigmas[0])
        places = renoised(self.form.places(clean), noise.to(clean.dtype), weights)
        return self.form.shaped(places, _grid_of(planes, self.form))

    def resized(self, positions: str) -> tuple[Layout, Tensor]:
        """T1 with the clean estimate resized to the next stage's size."""
        assert self.layout.grid is not None  # stages of one size are grids
        grid = self.grid(self.after.scale)
        planes = self.form.planes(self.clean, self.layout.grid)
        patch = self.form.patch
        planes = resize(planes, grid[1] * patch, grid[2] * patch)
        return Layout.resized(self.layout.full, grid, positions), self.renoise(planes)

    def repeat(self, layout: Layout) -> Tensor:
        """T2: the noisy latent's elements repeated over the places of `layout`, whitened."""
        places = self.form.places(self.noisy)
        noise = self.noise(len(layout.pick))
        old = self.levels.weights(self.before.sigmas[-1])
        new = self.levels.weights(self.after.sigmas[0])
        parents = layout.parents(self.layout).to(places.device)
        return self.form.shaped(
            repeated(places, noise, parents, self.form.axis, old, new), layout.grid
        )

    def decoded(self, planes: Tensor) -> Tensor:
        """Pixels in [−1, 1] of clean latent planes: (batch, 3, [frames,] height, width)."""
        vae = self._vae()
        mean, std = _statistics(vae, planes)
        latents = planes * std + mean
        self.run.deciding = True
        try:
            return vae.decode(latents[:, :, 0] if _is_flat(vae) else latents)[0]  # type: ignore[no-any-return]
        finally:
            self.run.deciding = False

    def encoded(self, pixels: Tensor) -> Tensor:
        """Clean latent planes of pixels in [−1, 1]; the inverse of `decoded`."""
        vae = self._vae()
        latents = vae.encode(pixels).latent_dist.mode()
        latents = latents[:, :, None] if latents.dim() == 4 else latents
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std  # type: ignore[no-any-return]

    def _vae(self) -> Any:
        vae = getattr(self.run.pipe, "vae", None)
        if vae is None:
            raise AccelError(f"{self.run.name} looks at the decoded estimate: it needs pipe.vae")
        return vae


def _statistics(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """(mean, std) that turn the denoiser's latents into the VAE's."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            torch.tensor(values).to(like)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
    return getattr(config, "shift_factor", None) or 0.0, 1 / config.scaling_factor


def _is_flat(vae: Any) -> bool:
    """Whether a VAE makes pictures, not videos."""
    first = vae.decoder.conv_in
    return isinstance(first, torch.nn.Conv2d)


def _grid_of(planes: Tensor, form: Form) -> Grid:
    return (planes.shape[2], planes.shape[3] // form.patch, planes.shape[4] // form.patch)


def stage(denoiser: Denoiser, method: StagedSampler, positions: str = "native") -> Handle:
    """Let `method` sample in stages on this denoiser; a pipeline's denoisers share one run."""
    name = type(method).__name__
    if denoiser.family.resized is None:
        raise AccelError(
            f"{name}: how {type(denoiser.module).__name__} takes another size than its pipeline's "
            "is not known; its Family needs `resized`"
        )
    clock = denoiser.clock
    if clock.staging is None:
        clock.staging = StagedRun(method, name, positions)
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
    denoisers: list[Denoiser] = field(default_factory=list)
    levels: NoiseLevels | None = None
    stages: list[Stage] = field(default_factory=list)
    step: int = 0
    layout: Layout | None = None
    form: Form | None = None
    pipe: Any = None
    generator: Any = None
    initial: Any = None
    deciding: bool = False
    """Whether the VAE decodes for the method itself, not for the user."""
    _undo: Callable[[], None] = lambda: None
    _history: dict[str, Any] = field(default_factory=dict)
    _patches: tuple[int, int] = (1, 1)
    _full: Grid = (1, 1, 1)

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
            self.pipe = self.generator = self.layout = self.initial = None

    def install(self, scheduler: Any) -> None:
        """The scheduler has its timesteps: put those of all stages in their place."""
        levels = NoiseLevels.of(scheduler)
        stages = self.method.stages(levels)
        if [each.scale for each in stages][-1] != 1:
            raise AccelError(f"{self.name}: the last stage must have the full size")
        self.levels, self.stages, self.step = levels, stages, 0
        self.layout = None
        if len(stages) > 1:
            starts = [sigma for each in stages for sigma in each.sigmas[:-1]]
            scheduler.timesteps = _timesteps(scheduler, levels, starts)
            if hasattr(scheduler, "sigmas"):
                scheduler.sigmas = _like(scheduler.sigmas, [*starts, stages[-1].sigmas[-1]])
        self._history = {
            name: copy.copy(getattr(scheduler, name))
            for name in _HISTORY
            if hasattr(scheduler, name)
        }

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
        latent = self.form.take(arguments.get(family.latent), self.layout)
        changed = {family.latent: latent, **family.resized(arguments, self.layout)}
        output = call(*_replaced(arguments, changed))
        return dressed(output)(self.form.put(output[0], self.layout))

    def _begin(self, denoiser: Denoiser, arguments: Arguments) -> None:
        """The first call of a run: now the sizes are known."""
        clock, family = denoiser.clock, denoiser.family
        if clock.total != clock.schedule:
            raise AccelError(
                f"{self.name}: this run starts in the middle of its schedule (image-to-image); "
                "staged sampling starts from noise"
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
        if self.step == 0:
            self.initial = sample
        number, inside = self.place
        live_output, live = form.take(output, layout), form.take(sample, layout)
        now = self.stages[number]
        with _local(scheduler, self.levels, now, inside, self.step):
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
                self.initial,
                self,
            )
            layout, noisy = self.method.cross(crossing)
            self.layout = layout
            self._forget(scheduler)
        self.step += 1
        return dressed(result)(form.put(noisy.to(sample.dtype), layout))

    def _forget(self, scheduler: Any) -> None:
        """A stage begins: solver histories and everything that is cached are of another size."""
        for name, value in self._history.items():
            setattr(scheduler, name, copy.copy(value))
        for denoiser in self.denoisers:
            denoiser.forget()


def _timesteps(scheduler: Any, levels: NoiseLevels, sigmas: list[float]) -> Tensor:
    values = [levels.timestep(sigma) for sigma in sigmas]
    whole = not scheduler.timesteps.is_floating_point()
    return _like(scheduler.timesteps, [round(value) for value in values] if whole else values)


def _like(old: Tensor, values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=old.dtype, device=old.device)


class _Gap(int):
    """Divides any number of training timesteps to itself: a DDIM step of this length."""

    def __rfloordiv__(self, _: int) -> int:
        return int(self)


@contextlib.contextmanager
def _local(
    scheduler: Any, levels: NoiseLevels, stage: Stage, inside: int, step: int
) -> Iterator[None]:
    """During a step the scheduler knows the stage's own levels only, afterwards all again."""
    before = scheduler.timesteps
    scheduler.timesteps = _timesteps(scheduler, levels, list(stage.sigmas[:-1]))
    try:
        if not hasattr(scheduler, "sigmas"):
            with _leap(scheduler, levels, stage, inside):
                yield
            return
        sigmas, scheduler.sigmas = scheduler.sigmas, _like(scheduler.sigmas, [*stage.sigmas])
        scheduler._step_index = inside
        try:
            yield
        finally:
            scheduler.sigmas, scheduler._step_index = sigmas, step + 1
    finally:
        scheduler.timesteps = before


@contextlib.contextmanager
def _leap(scheduler: Any, levels: NoiseLevels, stage: Stage, inside: int) -> Iterator[None]:
    """DDIM finds the timestep after this one from the number of steps: say how far to go."""
    now, then = (_whole(levels, sigma) for sigma in stage.sigmas[inside : inside + 2])
    count, scheduler.num_inference_steps = scheduler.num_inference_steps, _Gap(now - then)
    try:
        yield
    finally:
        scheduler.num_inference_steps = count


def _whole(levels: NoiseLevels, sigma: float) -> int:
    return round(levels.timestep(sigma)) if sigma > 0 else -1


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


def check_plan(owner: Any, scales: tuple[float, ...], shares: tuple[float, ...]) -> None:
    """Raise `AccelError` unless these are stages: as many shares as scales, ending at full size."""
    check(
        len(scales) >= 1 and all(is_number(each) and 0 < each <= 1 for each in scales),
        owner,
        "scales" if hasattr(owner, "scales") else "scale",
        "numbers above 0, at most 1",
    )
    check(
        len(shares) == len(scales)
        and all(is_number(each) and each > 0 for each in shares)
        and abs(sum(shares) - 1) < 1e-6,
        owner,
        "shares",
        f"{len(scales)} positive numbers that add up to 1",
    )
    check(scales[-1] == 1, owner, "scales", "1 at the end")
    if getattr(owner, "positions", "native") not in ("native", "spread"):
        check(False, owner, "positions", '"native" or "spread"')


def plan(
    levels: NoiseLevels,
    scales: tuple[float, ...],
    shares: tuple[float, ...],
    factors: list[float],
    gain: float = 1.0,
) -> list[Stage]:
    """Stages that end where their steps would end in the untouched run.

    `factors[k]` multiplies the noise-to-signal ratio between the end of stage k and the start of
    the next, where the size changes; neighbours of one size are one stage.
    """
    found: list[Stage] = []
    ends = [round(levels.steps * sum(shares[: number + 1])) for number in range(len(shares))]
    begin, start = 0, levels.sigmas[0]
    for number, (scale, end) in enumerate(zip(scales, ends, strict=True)):
        last = number + 1 == len(scales)
        if not last and scales[number + 1] == scale:
            continue
        if end <= begin:
            raise AccelError(
                f"a run of {levels.steps} steps is too short for stages of the shares {shares}: "
                f"stage {number + 1} would have none"
            )
        shift = scale * gain ** len(found)
        stop = levels.sigmas[end]
        if stop >= start:
            raise AccelError(f"stage {number + 1} would end noisier than it starts; add noise")
        found.append(Stage(levels.spaced(start, stop, end - begin, shift), scale))
        if not last:
            begin = end
            start = levels.noisier(stop, factors[number], f"the start of stage {number + 2}")
    return found

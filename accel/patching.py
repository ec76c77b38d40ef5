"""`patch`, `unpatch`, `patched`, `stats`: make a pipeline faster, and undo it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accel import registry
from accel.choosing import RecipeSource, choose
from accel.guard import LIMIT, Guard
from accel.hooks import PATCH, foreign_cache
from accel.memory_budget import Budget, read_bytes
from accel.method import AccelError, Method
from accel.pipeline_patch import DENOISERS, Patch
from accel.report import Report


def patch(
    pipe: Any,
    *methods: Method,
    recipe: RecipeSource | None = None,
    speedup: float | None = None,
    quality: str | None = None,
    memory: int | str | None = None,
    guard: bool = False,
    strict: bool = False,
) -> Patch:
    """Make `pipe` faster until `unpatch(pipe)`.

    `methods` are settings objects such as `MagCache()`; or give a `recipe` (a path, a dict, a
    `Recipe`, or "published:NAME" for settings that a method's authors published). With neither, the
    recipe that lies beside the model's weights is used, or one that is known for them or for a
    pipeline of this class and size, or else `EasyCache()`, which needs no knowledge of the model.

    `speedup` (a number above 1) or `quality` ("lossless", "balanced" or "fast": 45, 30 or 25 dB of
    median PSNR) choose among what calibration measured; without a calibration, `FitCache` measures
    the model in the first run. `memory`: the most that caches may hold, in bytes or as "2GB"; what
    they need is known after a run's first step. Where it is too much, `HoldResidual()` stands in
    for forecasts that hold more; where that is too much too, `AccelError` gives the number.

    `guard` looks at each prediction that was not computed and computes the step when it is not
    finite or drifted off (one host transfer a call): farther from the branch's last computed one
    than its own size, or than a calibrated recipe saw good ones go. `strict` raises `AccelError`.

    Keys and values of a prompt that cross-attention would compute anew at every step are computed
    once a run (`TextCache`, bit for bit the same), unless `memory` is given.

    Patching again replaces. Only this pipeline's objects are changed, never classes; on an error
    the pipeline is as before.
    """
    limit = read_bytes(memory)
    budget = None if limit is None else Budget(limit, registry.approximator("holdresidual")())
    previous = pipe.__dict__.get(PATCH) if hasattr(pipe, "__dict__") else None
    _refuse_foreign_caches(pipe)
    before = previous.methods if previous is not None else ()
    if previous is not None:  # first of all: recipes are known by the weights, as they really are
        previous.remove()
    try:
        chosen, valid_for = choose(pipe, methods, recipe, speedup, quality)
        _check_methods(chosen)
        watch = Guard(strict, valid_for.change or LIMIT) if guard or strict else None
        return Patch(pipe, chosen, budget, valid_for, watch)
    except BaseException:
        if previous is not None:
            previous.attach(before)
        raise


def unpatch(pipe: Any) -> None:
    """Give the pipeline back as it was; does nothing when it is not patched."""
    existing = getattr(pipe, "__dict__", {}).get(PATCH)
    if existing is not None:
        existing.remove()


@contextlib.contextmanager
def patched(pipe: Any, *methods: Method, **options: Any) -> Iterator[Patch]:
    """`with accel.patched(pipe, …):` patches for the block only; takes what `patch` takes."""
    handle = patch(pipe, *methods, **options)
    try:
        yield handle
    finally:
        handle.remove()


@contextlib.contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline is not patched; what was attached comes back after it."""
    previous = getattr(pipe, "__dict__", {}).get(PATCH)
    before = previous.methods if previous is not None else ()
    unpatch(pipe)
    try:
        yield
    finally:
        if previous is not None:
            previous.attach(before)


def stats(pipe: Any) -> Report:
    """What the last run of a patched pipeline computed and reused."""
    existing = getattr(pipe, "__dict__", {}).get(PATCH)
    if existing is None:
        raise AccelError(f"this {type(pipe).__name__} is not patched; call accel.patch(pipe) first")
    return existing.report()  # type: ignore[no-any-return]


def _check_methods(methods: tuple[Any, ...]) -> None:
    slots: dict[str, str] = {}
    for method in methods:
        name = type(method).__name__
        if isinstance(method, type) or not isinstance(method, Method):
            known = ", ".join(path.split(":")[1] for path in registry.METHODS.values())
            raise AccelError(f"{method!r} is not a method; accepted are objects such as {known}")
        if method.slot in slots:
            raise AccelError(
                f"{slots[method.slot]} and {name} both change the {method.slot!r} slot; use one"
            )
        slots[method.slot] = name


def _refuse_foreign_caches(pipe: Any) -> None:
    for name in DENOISERS:
        other = foreign_cache(getattr(pipe, name, None))
        if other is not None:
            raise AccelError(
                f"pipe.{name} already has a cache enabled by {other}; disable it first "
                f"(pipe.{name}.disable_cache())"
            )

"""Which methods a pipeline gets when the user names a speed, a quality, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel import registry
from accel.known_recipes import known_recipe
from accel.method import AccelError, Method, is_number
from accel.recipe import Recipe, Validity

logger = logging.getLogger(__name__)

QUALITIES: dict[str, float] = {"lossless": 45.0, "balanced": 30.0, "fast": 25.0}
"""The least median PSNR, in dB against the untouched run of the same seed, that a name promises."""
_UNPROVEN_SPEED = {"lossless": 1.5, "balanced": 2.5, "fast": 3.5}
"""What is aimed at where nothing was calibrated."""

RecipeSource = Recipe | Mapping[str, Any] | str | Path
Chosen = tuple[tuple[Method, ...], Validity]


def choose(
    pipe: Any,
    methods: tuple[Method, ...],
    recipe: RecipeSource | None,
    speedup: float | None,
    quality: str | None,
) -> Chosen:
    """Methods for a pipeline, and where they hold; everything is checked.

    With `speedup` or `quality` the choice is made from the front of `recipe`, or of the one that
    is known for the pipeline; without a front `FitCache` gets a share of computation that would
    give the speed-up, measures the model in its first run, and the quality is not known.
    """
    if methods and (recipe is not None or speedup is not None or quality is not None):
        raise AccelError("accel.patch: give methods, or a recipe, speedup or quality, not both")
    if speedup is not None and quality is not None:
        raise AccelError("accel.patch: give speedup or quality, not both")
    if methods:
        return methods, Validity()
    found = known_recipe(pipe) if recipe is None else Recipe.read(recipe)
    if recipe is not None and found is not None:
        _warn_of_another_model(pipe, found)
    if speedup is not None or quality is not None:
        return _for_target(found, speedup, quality)
    if found is not None:
        return found.methods, found.valid_for
    easy: Method = registry.method("easycache")()
    logger.info("no recipe is known for this model; using %s", easy)
    return (easy,), Validity()


def _warn_of_another_model(pipe: Any, recipe: Recipe) -> None:
    """What was measured on one model says nothing of another."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
    names = [type(getattr(part, "_orig_mod", part)).__name__ for part in parts if part is not None]
    if recipe.model and names and recipe.model not in names:
        logger.warning(
            "the recipe is of a %s, and this pipeline has a %s: its tables and figures do not "
            "hold here",
            recipe.model,
            " and a ".join(names),
        )


def _for_target(recipe: Recipe | None, speedup: float | None, quality: str | None) -> Chosen:
    if speedup is not None and not (is_number(speedup) and speedup > 1):
        raise AccelError(f"speedup={speedup!r}: a number above 1 is accepted")
    if quality is not None and quality not in QUALITIES:
        raise AccelError(f"quality={quality!r}: accepted are {', '.join(QUALITIES)}")
    if recipe is not None and recipe.front:
        psnr = None if quality is None else QUALITIES[quality]
        choice = recipe.choose(speedup=speedup, psnr=psnr)
        logger.info("measured to give %.2f× at %.1f dB", choice.speedup, choice.psnr)
        return choice.methods, recipe.valid_for
    aim = speedup if speedup is not None else _UNPROVEN_SPEED[quality or "balanced"]
    method: Method = registry.method("fitcache")(share=max(round(1 / aim, 3), 0.05))
    logger.warning(
        "no calibration is known for this model; using %s. Its first run is computed in full, and "
        "its quality is not proven: accel.calibrate(pipe, prompts) proves it",
        method,
    )
    return (method,), Validity()

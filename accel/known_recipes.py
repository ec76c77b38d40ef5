"""The recipe that is known for a pipeline: beside its weights, shipped for them, or published."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import accel
from accel import model_zoo
from accel.fingerprint import denoiser, fingerprint
from accel.method import AccelError
from accel.recipe import FILE_NAME, PUBLISHED, Recipe

logger = logging.getLogger(__name__)


def known_recipe(pipe: Any) -> Recipe | None:
    """The first of: the recipe in the folder the pipeline was loaded from; the shipped one whose
    calibration saw these very weights; settings that were published for a pipeline of this class
    and size, which are not measured by us and are said in the log.
    """
    for find in (_beside, _shipped, _published):
        found = find(pipe)
        if found is not None:
            return found
    return None


def _beside(pipe: Any) -> Recipe | None:
    origin = getattr(pipe, "config", {}).get("_name_or_path") if hasattr(pipe, "config") else None
    if not isinstance(origin, str | os.PathLike) or not (Path(origin) / FILE_NAME).is_file():
        return None
    return Recipe.load(Path(origin) / FILE_NAME)


def _shipped(pipe: Any) -> Recipe | None:
    files = [file for name in _zoo() if (file := model_zoo.path(name) / FILE_NAME).is_file()]
    shipped = [Recipe.load(file) for file in files]
    try:
        module = denoiser(pipe)
        if any(value.is_meta for value in module.parameters()):  # offloaded piece by piece
            return None
        recipes = [each for each in shipped if each.model == type(module).__name__]
        known = fingerprint(pipe) if recipes else ""
    except AccelError:  # two experts and quantised weights are never profiled
        return None
    return next(
        (one for one in recipes if any(r.get("fingerprint") == known for r in one.measured)), None
    )


def _zoo() -> list[str]:
    try:
        return model_zoo.names()
    except AccelError:  # an installation without the zoo
        return []


def _published(pipe: Any) -> Recipe | None:
    module = getattr(pipe, "transformer", None)
    if module is None or getattr(pipe, "transformer_2", None) is not None:
        return None
    for known in _models():
        wanted = known["config"]
        if known["pipeline"] == type(pipe).__name__ and wanted == {
            name: module.config.get(name) for name in wanted
        }:
            logger.info("using settings published as %s; not measured here", known["recipe"])
            return Recipe.read(PUBLISHED + known["recipe"])
    return None


def _models() -> list[dict[str, Any]]:
    """Pipelines by class and configuration, and the published settings for them."""
    places = (Path(folder) / "pipelines" / "known_models.json" for folder in accel.__path__)
    file = next(place for place in places if place.is_file())
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found

"""Tensors that belong to a recipe: safetensors files beside it, known by their SHA-256.

A recipe in memory names such a file by its path; one on disk by its bare name, so that both move
together and nothing else can be reached.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel import registry
from accel.method import AccelError

if TYPE_CHECKING:
    from accel.recipe import Recipe

SUFFIX = ".safetensors"


def pack(recipe: Recipe, place: Path) -> Recipe:
    """The recipe for a file at `place`; its tensors are copied beside it, named by content."""
    tensors: dict[str, str] = {}

    def keep(path: str) -> str:
        file = Path(path)
        if not file.is_file():
            raise AccelError(f"recipe {place}: its tensors {file} are not there to be kept with it")
        digest = _digest(file)
        name = f"{place.stem}-{digest[:12]}{SUFFIX}"
        if not (place.parent / name).is_file():
            part = place.parent / (name + ".part")
            shutil.copyfile(file, part)
            os.replace(part, place.parent / name)
        tensors[name] = digest
        return name

    changed = _with_files(recipe, keep)
    return changed.model_copy(update={"tensors": tensors})


def unpack(recipe: Recipe, place: Path) -> Recipe:
    """The recipe read from `place`, with the paths of its tensors; their content is checked."""

    def find(name: str) -> str:
        if name != Path(name).name or name not in recipe.tensors:
            raise AccelError(
                f"recipe {place}: {name!r} is none of its tensors; a bare name that `tensors` "
                "lists with its SHA-256 is accepted"
            )
        file = place.parent / name
        if not file.is_file():
            raise AccelError(f"recipe {place}: its tensors {name} are missing beside it")
        if _digest(file) != recipe.tensors[name]:
            raise AccelError(f"recipe {place}: {name} is not the file that it was saved with")
        return str(file)

    return _with_files(recipe, find)


def _with_files(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """With every setting that names a file changed."""
    entries = tuple(_entry(each, change) for each in recipe.entries)
    front = tuple(
        each.model_copy(update={"entries": tuple(_entry(one, change) for one in each.entries)})
        for each in recipe.front
    )
    return recipe.model_copy(update={"entries": entries, "front": front})


def _entry(entry: Any, change: Callable[[str], str]) -> Any:
    kind = registry.method(entry.name)
    for name in getattr(kind, "folders", ()):
        if entry.settings.get(name):
            raise AccelError(
                f"{entry.name}({name}={entry.settings[name]!r}): a recipe file holds no paths; put "
                "the folder beside the model, where it is found without being named"
            )
    named = {name: entry.settings.get(name) for name in getattr(kind, "files", ())}
    settings = {name: change(str(value)) for name, value in named.items() if value}
    return entry.model_copy(update={"settings": {**entry.settings, **settings}})


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

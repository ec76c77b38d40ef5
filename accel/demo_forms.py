"""What the demo asks: the method panel made from the registry, recipes as text, presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel import model_zoo, registry
from accel.method import AccelError
from accel.recipe import FILE_NAME, Recipe

ZOO = "zoo:"


@dataclass(frozen=True)
class Field:
    """One setting of a method as a form shows it. `kind`: bool, int, float, forecast or json."""

    name: str
    kind: str
    default: Any


def methods(guidance: bool) -> list[str]:
    """Names of the registered methods that change guidance, or of all the others."""
    places = registry.METHODS.values()
    return sorted(place.split(":")[1] for place in places if (".samplers." in place) is guidance)


def forecasts() -> list[str]:
    """Names of the registered approximators."""
    return sorted(place.split(":")[1] for place in registry.APPROXIMATORS.values())


def fields(name: str) -> list[Field]:
    """The settings of a method, from its dataclass."""
    return [_field(item) for item in dataclasses.fields(registry.method(name))]


def _field(item: dataclasses.Field[Any]) -> Field:
    default = None if item.default is dataclasses.MISSING else item.default
    if dataclasses.is_dataclass(default):
        return Field(item.name, "forecast", type(default).__name__)
    if isinstance(default, bool | int | float):
        return Field(item.name, type(default).__name__, default)
    return Field(item.name, "json", json.dumps(default))


def trials(name: str) -> dict[str, Recipe]:
    """The settings that benchmarks try, mild to strong."""
    kind = registry.method(name)
    return {_words(trial): Recipe.of((kind(**trial),)) for trial in kind.trials}


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "as it comes"


def filled(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """A recipe's entry from a filled form (in the order of `fields`), without the defaults."""
    chosen: dict[str, Any] = {}
    for field, value in zip(fields(name), values, strict=True):
        if value is None or value == field.default:
            continue
        if field.kind == "int":
            value = int(value)
        elif field.kind == "forecast":
            value = {"name": value}
        elif field.kind == "json":
            value = _json(field.name, value)
        chosen[field.name] = value
    return {"name": name, "settings": chosen}


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if text.replace("_", "").isalnum():
            return text
        raise AccelError(f"{name}: {text!r} is neither a word nor JSON") from None


def write(recipe: Recipe) -> str:
    """A recipe as text for editing, without what is empty."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"schema_version": recipe.schema_version, **content}, indent=1)


def read(text: str) -> Recipe:
    """The checked recipe that a text holds."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AccelError(f"recipe: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise AccelError("recipe: must be a JSON object")
    return Recipe.read(content)


def refuse_places(recipe: Recipe) -> None:
    """Visitors may not name files or folders of the server: methods find those of the model."""
    for entry in recipe.entries:
        kind = registry.method(entry.name)
        for name in (*getattr(kind, "folders", ()), *getattr(kind, "files", ())):
            if entry.settings.get(name) is not None:
                raise AccelError(f"{entry.name}: {name} cannot be chosen in the demo")


def best_known(model: str) -> Recipe:
    """The recipe in a model's folder, or EasyCache, which needs no knowledge of the model."""
    zoo = model.startswith(ZOO)
    folder = model_zoo.path(model.removeprefix(ZOO)) if zoo else Path(model)
    if (folder / FILE_NAME).is_file():
        return Recipe.load(folder / FILE_NAME)
    return Recipe.of((registry.method("easycache")(),))


def presets(model: str) -> dict[str, Recipe]:
    """What can be chosen without knowing methods: the best known recipe comes first."""
    best = best_known(model)
    names = " + ".join(entry.name for entry in best.entries)
    found = {f"best known: {names}": best.model_copy(update={"front": (), "measured": ()})}
    for choice in best.front:
        label = f"calibrated: {choice.speedup:.1f}× at {choice.psnr:.0f} dB"
        found[label] = Recipe(model=best.model, valid_for=best.valid_for, entries=choice.entries)
    for words, recipe in trials("easycache").items():
        found[f"any model: EasyCache, {words}"] = recipe
    return found | {"nothing: the untouched pipeline": Recipe(entries=())}


def prompts(model: str) -> list[str]:
    """Prompts of the kind that a model was trained on, from those held out of training."""
    name = model.removeprefix(ZOO) if model.startswith(ZOO) else model_zoo.names()[0]
    return model_zoo.prompts(name, "heldout").read_text(encoding="utf-8").splitlines()

"""The small trained models that come with the package."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, Literal

import accel
from accel.method import AccelError


def folder() -> Path:
    """Where the models lie: inside an installed package, beside it in a checkout."""
    for place in accel.__path__:
        if (Path(place) / "zoo").is_dir():
            return Path(place) / "zoo"
    raise AccelError("the model zoo is missing from this installation of accel")


def names() -> list[str]:
    """The models that are there."""
    return sorted(file.parent.name for file in folder().glob("*/model_index.json"))


def path(name: str) -> Path:
    """The folder of one model, loadable by `DiffusionPipeline.from_pretrained`."""
    if name not in names():
        raise AccelError(f"unknown zoo model {name!r}; accepted: {', '.join(names()) or 'none'}")
    return folder() / name


def settings(name: str) -> dict[str, Any]:
    """`call` (arguments the model was made for), `fps` and `negative_prompt`."""
    found: dict[str, Any] = json.loads((path(name) / "call.json").read_text(encoding="utf-8"))
    return found


def prompts(name: str, part: Literal["train", "heldout", "final"]) -> Path:
    """A prompt file: for tuning (train, heldout) or for final figures only (final).

    A model has its own or, where they know the same names, one with the others of its kind.
    """
    own = path(name) / f"prompts_{part}.txt"
    if own.exists():
        return own
    kind = "" if settings(name)["fps"] else "_image"
    return folder() / f"prompts_{part}{kind}.txt"


def load(name: str) -> tuple[Any, dict[str, Any], int | None]:
    """The pipeline in fp32, the arguments of its call, and its frames a second (or None)."""
    import torch
    from diffusers import DiffusionPipeline

    known = settings(name)
    options = dtype_option(torch.float32)
    pipe = DiffusionPipeline.from_pretrained(path(name), local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    call = {"negative_prompt": known["negative_prompt"], **known["call"]}
    return pipe, call, known["fps"]


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The argument of `from_pretrained` that sets the dtype; its name changed in diffusers 0.42."""
    release = tuple(int(part) for part in importlib.metadata.version("diffusers").split(".")[:2])
    return {"dtype" if release >= (0, 42) else "torch_dtype": dtype}

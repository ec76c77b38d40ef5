"""Folders of small trained networks: safetensors weights and a JSON configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from accel.method import AccelError

Network = TypeVar("Network", bound=nn.Module)


def save(network: nn.Module, config: Any, folder: Path, name: str, notes: dict[str, Any]) -> None:
    """Write `name`.safetensors in half precision and `name`.json, with `notes` on the training.

    `config` is a dataclass of the network's settings.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    content = {**asdict(config), "training": notes}
    parts = [folder / f"{name}.{suffix}.part" for suffix in ("safetensors", "json")]
    save_file(weights, parts[0])
    parts[1].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for part in parts:  # both are whole before either takes its place
        part.replace(part.with_suffix(""))


def load(
    folder: Path, name: str, build: Callable[[dict[str, Any]], Network], what: str, maker: str
) -> Network:
    """The network that `save` wrote, in fp32; `build` makes it from the configuration.

    Raises `AccelError` for any other folder; `what` it should hold and its `maker` are named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{name}.json holds no object")
        content.pop("training", None)
        network = build(content)
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise AccelError(
            f"{folder}: no {what} can be loaded ({reason}); a folder with {name}.json and "
            f"{name}.safetensors as {maker} writes them is accepted"
        ) from error
    return network.requires_grad_(False).eval()


def find(given: str | None, module: Any, name: str, otherwise: str) -> Path:
    """The folder the user gave, or `adapters`/`name` in the model's folder of a denoiser.

    Raises `AccelError`, saying what to do `otherwise`, where there is none.
    """
    if given is not None:
        return Path(given)
    origin = getattr(module.config, "_name_or_path", None)
    # pipelines name the denoiser's own folder; from_pretrained(…, subfolder="unet") the model's
    places = [Path(os.fspath(origin)).parent, Path(os.fspath(origin))] if origin else []
    found = next((at for place in places if (at := place / "adapters" / name).is_dir()), None)
    if found is None:
        raise AccelError(
            f"this model has no folder adapters/{name} beside its weights; {otherwise}"
        )
    return found

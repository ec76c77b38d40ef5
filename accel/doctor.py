"""What this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

_NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow")
_OPTIONAL = {
    "av": "MP4 files: pip install 'diffusers-accel[video]'",
    "efficientnet-lite-pytorch": "feature distance: pip install 'diffusers-accel[metrics]'",
    "triton": "low-bit kernels: pip install 'diffusers-accel[triton]'",
    "torchao": "low-bit linear layers on a GPU: pip install torchao",
    "gradio": "demo: pip install 'diffusers-accel[demo]'",
    "peft": "LoRA: pip install peft",
}
_OLDEST_DIFFUSERS = (0, 41)


def examine() -> dict[str, Any]:
    """Versions, devices, the zoo and free disk; `problems` is empty when all is well."""
    problems: list[str] = []
    versions = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    problems += [f"{name} is not installed" for name in _NEEDED if versions[name] is None]
    diffusers = versions["diffusers"]
    if diffusers is not None:
        release = tuple(int(part) for part in diffusers.split(".")[:2])
        if release < _OLDEST_DIFFUSERS:
            problems.append(f"diffusers {diffusers} is too old; 0.41 or newer is supported")
    if versions["torch"] is not None and importlib.util.find_spec("torchvision") is not None:
        problems += _torchvision_problem()
    from accel import model_zoo
    from accel.method import AccelError

    try:
        zoo = model_zoo.names()
    except AccelError as error:
        zoo = []
        problems.append(str(error))
    return {
        "python": platform.python_version(),
        "versions": versions,
        "hints": {name: hint for name, hint in _OPTIONAL.items() if versions[name] is None},
        "devices": _devices() if versions["torch"] is not None else [],
        "kernels": _kernels() if not problems else {},
        "zoo": zoo,
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision_problem() -> list[str]:
    """A torchvision of another torch build breaks `import diffusers` itself."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return [
            f"torchvision does not fit this torch ({error}) and breaks diffusers: "
            "pip uninstall torchvision, or install the build that fits"
        ]
    return []


def _kernels() -> dict[str, dict[str, str]]:
    """Which kernels of `Attention` and `Linear` run on the first device, or why they do not.

    Asked for bfloat16 tensors with heads of 128 channels and no mask.
    """
    import torch

    from accel import registry

    name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and torch.backends.mps.is_available():
        name = "mps"
    device = torch.device(name)
    query = torch.zeros(1, 1, 64, 128, device=device, dtype=torch.bfloat16)
    return {
        f"attention on {name}": registry.method("attention").survey(query),
        f"linear on {name}": registry.method("linear").survey(device),
    }


def _devices() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)"]

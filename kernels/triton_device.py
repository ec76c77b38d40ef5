"""Where the Triton kernels can run, and how a kernel is tried that has a torch twin."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OLDEST = (3, 4)
"""The first Triton that takes tuples of tensors and has `triton.knobs`; torch 2.8 brings it."""

_Result = TypeVar("_Result")
_broken: set[str] = set()


@functools.cache
def why_not(device: torch.device, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why Triton kernels cannot run on `device`, or None; `capability`: the least they need."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"the tensors are on {device.type}; the Triton kernels run on CUDA devices"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the Triton kernels are tested on CUDA devices"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"compute capability {_dotted(found)} is below {_dotted(capability)}"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why Triton itself does not serve, or None (it is not imported here)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'diffusers-accel[triton]'"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {_dotted(OLDEST)}, which torch 2.8 brings"
    return None


def attempt(kernel: str, like: Tensor, launch: Callable[[], _Result]) -> _Result | None:
    """What a Triton kernel makes of tensors like `like`; None where its torch twin has to do.

    Triton launches on the current CUDA device, which need not be the tensors'. A kernel that fails
    (no compiler, an old driver) is said once and not tried again.
    """
    if why_not(like.device) is not None or kernel in _broken:
        return None
    if torch.compiler.is_compiling():
        return launch()
    try:
        with torch.cuda.device_of(like):
            return launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's or a driver's: no run may die of it
        logger.warning("%s: torch instead of Triton: %s: %s", kernel, type(error).__name__, error)
        _broken.add(kernel)
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

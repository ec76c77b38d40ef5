"""Whether the Triton kernels of single passes over a tensor can run on a device."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'diffusers-accel[triton]'"
    if device.type != "cuda":
        return f"the tensors are on {device.type}; the Triton kernels run on CUDA devices"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the Triton kernels are tested on CUDA devices"
    found = torch.cuda.get_device_capability(device)
    if found < (8, 0):
        return f"compute capability {'.'.join(map(str, found))} is below 8.0"
    return None

"""Which weights a pipeline's denoiser has: what profiles and recipes know a model by."""

from __future__ import annotations

import hashlib
from typing import Any

from accel.method import AccelError

_SAMPLES = 64


def fingerprint(pipe: Any) -> str:
    """The denoiser's class and a digest of its parameters' names, shapes and sampled values.

    Raises `AccelError` for weights that other tensors stand for, as torchao's do.
    """
    module = denoiser(pipe)
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if hasattr(value, "__tensor_flatten__"):
            raise AccelError(
                f"{type(module).__name__}: {name} is a {type(value).__name__}; calibration knows a "
                "model by its weights as they were before they were quantised"
            )
        flat = value.detach().flatten()
        sample = flat[:: max(len(flat) // _SAMPLES, 1)][:_SAMPLES].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"{type(module).__name__}:{digest.hexdigest()[:16]}"


def denoiser(pipe: Any) -> Any:
    """The pipeline's one denoiser; two experts in turn cannot be profiled."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    modules = [module for module in found if module is not None]
    if len(modules) != 1:
        raise AccelError(
            f"profiles are of pipelines with one denoiser; {type(pipe).__name__} has {len(modules)}"
        )
    return modules[0]

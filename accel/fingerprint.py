"""Which weights a pipeline's denoiser has: what profiles and recipes know a model by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

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
    for name, layer in module.named_modules():
        if getattr(layer, "lora_A", None):  # the weights do not say how much of them acts
            acting = {} if layer.disable_adapters else layer.scaling
            acting = {each: acting.get(each, 0.0) for each in layer.active_adapters}
            digest.update(f"{name}{sorted(acting.items())}".encode())
    return f"{type(module).__name__}:{digest.hexdigest()[:16]}"


def described(value: Any) -> Any:
    """JSON that tells one value of a call from another: pictures and tensors by their content."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu()
        value = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if hasattr(value, "tobytes"):  # PIL pictures and arrays
        about = (kind, getattr(value, "shape", getattr(value, "size", None)))
        return f"{about} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', kind)}"
    return kind


def schedule(pipe: Any) -> Any:
    """JSON of a pipeline's scheduler: its class and configuration."""
    scheduler = pipe.scheduler
    return [type(scheduler).__name__, described(dict(getattr(scheduler, "config", {})))]


def denoiser(pipe: Any) -> Any:
    """The pipeline's one denoiser; two experts in turn cannot be profiled."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    modules = [module for module in found if module is not None]
    if len(modules) != 1:
        raise AccelError(
            f"profiles are of pipelines with one denoiser; {type(pipe).__name__} has {len(modules)}"
        )
    return modules[0]

"""Load a pipeline and set it up; the options are named as diffusers-cli names them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel import model_zoo
from accel.method import AccelError, MissingError

logger = logging.getLogger(__name__)
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOADS = ("model", "group")


@dataclass(frozen=True)
class Loading:
    """How a pipeline is loaded and set up.

    dtype: auto, fp32, bf16 or fp16. device: auto, cpu, cuda, cuda:1, … lora: each a file, a folder
    or a repository, or JSON `{"lora_id": …, "lora_scale": 1.0, "weight_name": …}`. cpu_offload:
    "model" or "group". attention_backend: a name of diffusers' attention dispatcher. compile: the
    repeated blocks of the denoisers are compiled by their region.
    """

    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    revision: str | None = None
    lora: tuple[str, ...] = ()
    cpu_offload: str | None = None
    attention_backend: str | None = None
    vae_tiling: bool = False
    compile: bool = False


def load(model: str, options: Loading) -> tuple[Any, dict[str, Any], int | None]:
    """A pipeline ready to run, the arguments that the model was made for, its frames a second."""
    _check(options)
    _quiet()
    if model.startswith("zoo:"):
        pipe, call, fps = model_zoo.load(model.removeprefix("zoo:"))
        if DTYPES[options.dtype] is not None:
            pipe.to(DTYPES[options.dtype])
    else:
        pipe, call, fps = _folder_or_repository(model, options), {}, None
    _add_loras(pipe, options.lora)
    if options.attention_backend is not None:
        _set_attention(pipe, options.attention_backend)
    if options.vae_tiling:
        if not hasattr(pipe.vae, "enable_tiling"):
            raise AccelError(f"--vae-tiling: {type(pipe.vae).__name__} cannot tile")
        pipe.vae.enable_tiling()
    _place(pipe, options)
    if options.compile:
        for name, denoiser in _denoisers(pipe):
            if not getattr(denoiser, "_repeated_blocks", None):
                raise AccelError(f"--compile: {name} ({type(denoiser).__name__}) has no regions")
            denoiser.compile_repeated_blocks(fullgraph=True)
    return pipe, call, fps


def _check(options: Loading) -> None:
    if options.dtype not in DTYPES:
        raise AccelError(f"unknown dtype {options.dtype!r}; accepted: {', '.join(DTYPES)}")
    if options.cpu_offload not in (None, *OFFLOADS):
        raise AccelError(
            f"unknown --cpu-offload {options.cpu_offload!r}; accepted: {', '.join(OFFLOADS)}"
        )
    if options.device != "auto":
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise AccelError(f"unknown device {options.device!r}") from error
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise MissingError(f"device {options.device!r} is not here: {reason}") from error


def _quiet() -> None:
    """No bars for loading weights: stderr is for what this command itself reports."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _folder_or_repository(model: str, options: Loading) -> Any:
    from diffusers import DiffusionPipeline

    dtype = DTYPES[options.dtype]
    chosen: dict[str, Any] = {} if dtype is None else model_zoo.dtype_option(dtype)
    chosen |= {"variant": options.variant, "revision": options.revision}
    try:
        pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **chosen)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        zoo = ", ".join(f"zoo:{name}" for name in model_zoo.names())
        reason = str(error).splitlines()[0]
        raise AccelError(
            f"model {model!r} cannot be loaded ({reason}); accepted: {zoo}, a folder or a "
            "repository name"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _add_loras(pipe: Any, loras: tuple[str, ...]) -> None:
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise AccelError(f"--lora: {type(pipe).__name__} takes no LoRA")
    names, scales = [], []
    for index, text in enumerate(loras):
        wanted = _lora(text)
        source, weight_name = Path(wanted["lora_id"]), wanted.get("weight_name")
        if source.is_file():
            source, weight_name = source.parent, source.name
        name = wanted.get("adapter_name", f"lora_{index}")
        try:
            pipe.load_lora_weights(str(source), weight_name=weight_name, adapter_name=name)
            names.append(name)
            scales.append(float(wanted.get("lora_scale", 1.0)))
            pipe.set_adapters(names, scales)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise AccelError(f"--lora {wanted['lora_id']}: cannot be loaded ({reason})") from error


def _lora(text: str) -> dict[str, Any]:
    """A LoRA as diffusers-cli writes it, or just its file, folder or repository."""
    if not text.lstrip().startswith("{"):
        return {"lora_id": text}
    known = {"lora_id", "lora_scale", "adapter_name", "weight_name"}
    try:
        wanted: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise AccelError(f"--lora: not JSON ({error})") from error
    if not isinstance(wanted.get("lora_id"), str) or set(wanted) - known:
        raise AccelError(f"--lora: needs a text lora_id; accepted: {', '.join(sorted(known))}")
    return wanted


def _set_attention(pipe: Any, backend: str) -> None:
    for name, denoiser in _denoisers(pipe):
        processors = (getattr(module, "processor", None) for module in denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise AccelError(
                f"--attention-backend: {name} ({type(denoiser).__name__}) does not use the "
                "attention dispatcher"
            )
        try:
            denoiser.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise AccelError(f"--attention-backend {backend!r}: {error}") from error


def _place(pipe: Any, options: Loading) -> None:
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.cpu_offload is None:
        pipe.to(device)
    elif torch.device(device).type == "cpu":
        raise AccelError("--cpu-offload needs a device other than the CPU")
    elif options.cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(
            onload_device=torch.device(device), offload_type="leaf_level", use_stream=True
        )


def _denoisers(pipe: Any) -> Iterator[tuple[str, Any]]:
    for name in pipe.components:
        if name.startswith(("transformer", "unet")) and getattr(pipe, name) is not None:
            yield name, getattr(pipe, name)

"""Linear layers in fewer bits: INT8 or FP8 products, or INT8 or INT4 weights alone."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.denoiser import Denoiser
from accel.hooks import is_group_offloaded
from accel.kernels.linear_formats import FORMATS, group_size
from accel.kernels.linear_w8a8 import w8a8
from accel.kernels.linear_weight import QuantisedWeight
from accel.kernels.triton_device import why_not
from accel.method import AccelError, Handle, check, is_count

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torchao", "own")


@dataclass(frozen=True)
class Linear:
    """Store the weights of the blocks' linear layers in fewer bits, and multiply in them.

    `format`: "w8a8" INT8 weights (a scale for each output) times INT8 activations (a scale for each
    token, taken anew at each call); "fp8" the same in e4m3; "int8" and "int4" weights alone (INT4
    with a scale for each group of 64 inputs), which saves memory and no time. Round to nearest,
    without calibration: no channel is moved from activations to weights (SmoothQuant, Xiao et al.,
    2022, does that).

    `layers` and `skip`: patterns of module names inside the denoiser; modulation and norm layers
    are skipped by default. `least`: smaller layers (inputs or outputs) keep their weights.
    `backend`: "torchao" (the package), "own" (Triton for w8a8 on CUDA, plain torch otherwise), or
    "auto": torchao on CUDA where it serves, else own. On a CPU this is a reference, slower than
    the layers it replaces.

    The weights' own `Parameter` objects come back on removal, bit for bit; meanwhile those of a
    CUDA model wait in host memory. LoRA may be loaded before and after, but not fused while
    patched. Static: rows of a batch are independent.
    """

    slot: ClassVar[str] = "linear"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"format": "w8a8"},
        {"format": "fp8"},
        {"format": "int8"},
        {"format": "int4"},
    )

    format: str = "w8a8"
    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("*norm*", "*embed*", "*lora_*", "*modulation*", "*_mod.*")
    least: int = 128
    backend: str = "auto"

    def __post_init__(self) -> None:
        check(self.format in FORMATS, self, "format", f"one of {', '.join(FORMATS)}")
        check(self.backend in BACKENDS, self, "backend", f"one of {', '.join(BACKENDS)}")
        check(is_count(self.least, 1), self, "least", "a whole number ≥ 1")
        for field in ("layers", "skip"):
            value = getattr(self, field)
            patterns = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
            check(patterns, self, field, "a tuple of name patterns")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Exchange the weights of the chosen layers of all blocks."""
        if is_group_offloaded(denoiser.module):
            raise AccelError(
                "Linear: group offload keeps its own list of the weights that it moves; offload "
                "whole models instead (enable_model_cpu_offload)"
            )
        chosen = self._chosen(denoiser)
        if not chosen:
            raise AccelError(
                f"Linear: no linear layer of the blocks of {type(denoiser.module).__name__} with a "
                f"floating-point weight and at least {self.least} inputs and outputs has a name "
                f"like {' or '.join(self.layers)} and not like {' or '.join(self.skip)}"
            )
        handles: list[Handle] = []
        try:
            for module in chosen:
                handles.append(Handle(_exchange(module, self.quantised(module.weight))))
        except BaseException:
            Handle.together(handles).remove()
            raise
        if chosen[0].weight.device.type == "cpu":
            logger.info("Linear: on a CPU this shows the precision; it is slower than before")
        return Handle.together(handles)

    @classmethod
    def survey(cls, device: torch.device) -> dict[str, str]:
        """Each format, and what computes it on a device: "torchao", or what else and why."""
        reasons = {name: torchao_why_not(name, device) for name in FORMATS}
        missing = why_not(device)
        own = {name: "plain torch" for name in FORMATS}
        own["w8a8"] = "Triton" if missing is None else f"plain torch ({missing})"
        return {
            name: "torchao" if reason is None else f"{own[name]}: {reason}"
            for name, reason in reasons.items()
        }

    def _chosen(self, denoiser: Denoiser) -> list[Any]:
        """The linear layers inside the blocks, by kind, name, size and what a format can hold."""
        inside = {id(part) for block in denoiser.chain.blocks for part in block.modules()}
        return [
            module
            for name, module in denoiser.module.named_modules()
            if id(module) in inside
            and isinstance(module, torch.nn.Linear)
            and type(module.weight) is torch.nn.Parameter
            and module.weight.is_floating_point()
            and module.weight.device.type != "meta"
            and min(module.weight.shape) >= self.least
            and (self.format != "int4" or group_size(module.in_features) > 0)
            and _fits(name, self.layers)
            and not _fits(name, self.skip)
        ]

    def quantised(self, weight: Tensor) -> Tensor:
        """What stands in for a weight (out_features, in_features)."""
        if self.backend == "own":
            return self._own(weight)
        reason = torchao_why_not(self.format, weight.device, explicit=self.backend == "torchao")
        if reason is None:
            return _by_torchao(weight, self.format)
        if self.backend == "torchao":
            raise AccelError(f"Linear({self.format!r}, backend='torchao'): {reason}")
        return self._own(weight)

    def _own(self, weight: Tensor) -> Tensor:
        return QuantisedWeight.of(weight, self.format, w8a8 if self.format == "w8a8" else None)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _exchange(module: Any, quantised: Tensor) -> Callable[[], None]:
    """Put a quantised weight into a layer; the undo puts the very same parameter back.

    It comes back on the device and in the dtype that the layer was moved to meanwhile.
    """
    original = module.weight
    stand_in = torch.nn.Parameter(quantised, requires_grad=False)
    module._parameters["weight"] = stand_in
    if original.device.type == "cuda":
        original.data = original.data.to("cpu")

    def undo() -> None:
        # torchao's weights say their first dtype whatever the layer was moved to
        now = module.weight if module.bias is None else module.bias
        if not now.is_meta:  # offloaded piece by piece since: its hooks move the original too
            original.data = original.data.to(now.device, now.dtype)
        module._parameters["weight"] = original

    return undo


def torchao_why_not(name: str, device: torch.device, explicit: bool = False) -> str | None:
    """Why torchao does not serve a format on a device, or None.

    `explicit`: also where it runs but gains nothing (a CPU).
    """
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao"
    if name == "int4" and importlib.util.find_spec("mslk") is None:
        return "torchao's INT4 weights need the package mslk"
    if device.type != "cuda":
        if name == "fp8" or not explicit:
            return f"torchao gains nothing on {device.type}"
        return None
    if name == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return "FP8 products need compute capability 8.9"
    return None


def _by_torchao(weight: Tensor, name: str) -> Tensor:
    """torchao's quantised copy of a weight, made on a layer of its own."""
    quantization = importlib.import_module("torchao.quantization")
    holder = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    config = {
        "w8a8": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "fp8": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow()
        ),
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.Int4WeightOnlyConfig(group_size=group_size(weight.shape[1])),
    }[name]()
    quantization.quantize_(holder, config)
    quantised: Tensor = holder.weight.detach()
    return quantised

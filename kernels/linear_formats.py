"""Number formats of linear layers: how a weight is stored, and the layer computed with it in torch.

Weights are (out_features, in_features), activations (…, in_features). All scales are symmetric:
the largest magnitude of a group becomes the largest value of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GROUPS = (64, 32, 16)
"""Inputs that share a scale at four bits: the first one that divides `in_features`."""


@dataclass(frozen=True)
class Format:
    """One number format.

    `quantise(weight)` → (values, scale); `dequantise(values, scale)` → the weight in fp32;
    `activations(x)` → (values, scale of each row), or None where they stay as they are.
    """

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantise: Callable[[Tensor, Tensor], Tensor]
    activations: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def linear(self, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The layer by its definition.

        Products of 8-bit values are summed in fp32, which is exact up to 1040 inputs of INT8 and
        rounds like any fp32 sum beyond.
        """
        if self.activations is None:
            return functional.linear(x, self.dequantise(values, scale).to(x.dtype), bias)
        rows, row_scale = self.activations(x)
        product = functional.linear(rows.float(), values.float())
        output = product * row_scale * scale[:, 0]
        return (output if bias is None else output + bias).to(x.dtype)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 with one fp32 scale for each row (last axis), halves rounded away from zero."""
    exact = x.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    ratio = exact / scale
    return torch.trunc(ratio + torch.copysign(ratio.new_tensor(0.5), ratio)).to(torch.int8), scale


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 with one fp32 scale for each row (last axis)."""
    exact = x.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (exact / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def int4_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """INT4, two values a byte, one scale for each row and group of inputs."""
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, -1, group_size(inputs))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    codes = (torch.round(groups / scale) + 8).to(torch.uint8).view(outputs, inputs)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale[..., 0]


def from_int4_groups(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight that `int4_groups` stored."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).float() - 8
    groups = codes.view(*scale.shape, -1) * scale[..., None]
    return groups.flatten(1)


def group_size(inputs: int) -> int:
    """The group that divides `inputs`, or 0."""
    return next((size for size in GROUPS if inputs % size == 0), 0)


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale


FORMATS: dict[str, Format] = {
    "w8a8": Format(int8_rows, _scaled, int8_rows),
    "fp8": Format(e4m3_rows, _scaled, e4m3_rows),
    "int8": Format(int8_rows, _scaled),
    "int4": Format(int4_groups, from_int4_groups),
}
"""w8a8 and fp8 quantise weights and activations, int8 and int4 weights only."""

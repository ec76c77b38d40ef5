"""INT8 weights times INT8 activations: quantise rows, multiply, scale and add the bias.

Two Triton kernels and their torch reference (`linear_formats`). The scaling and the bias are part
of the multiplication, which torch's own `_int_mm` leaves to more passes over the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.kernels.attention_inputs import triton_installed
from accel.kernels.linear_formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor


def why_not(x: Tensor) -> str | None:
    """Why the Triton kernels cannot run on this activation, or None."""
    import torch

    if not triton_installed():
        return "Triton is not installed: pip install 'diffusers-accel[triton]'"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {x.device.type}; the Triton kernels run on CUDA devices"
    found = torch.cuda.get_device_capability(x.device)
    if found < (8, 0):
        return f"compute capability {'.'.join(map(str, found))} is below 8.0"
    return None


def w8a8(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times INT8 `values` (out, in) with fp32 `scale` (out, 1), in x's dtype.

    By Triton on CUDA devices of compute capability ≥ 8.0, else by the reference.
    """
    if why_not(x) is None:
        from accel.kernels.linear_w8a8_triton import w8a8_triton

        return w8a8_triton(x, values, scale, bias)
    return FORMATS["w8a8"].linear(x, values, scale, bias)

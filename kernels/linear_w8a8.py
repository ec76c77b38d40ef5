"""INT8 weights times INT8 activations: quantise rows, multiply, scale and add the bias.

Two Triton kernels and their torch reference (`linear_formats`). The scaling and the bias are part
of the multiplication, which torch's own `_int_mm` leaves to more passes over the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.kernels.linear_formats import FORMATS
from accel.kernels.triton_device import attempt

if TYPE_CHECKING:
    from torch import Tensor


def w8a8(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times INT8 `values` (out, in) with fp32 `scale` (out, 1), in x's dtype.

    By Triton on CUDA devices of compute capability ≥ 8.0, else by the reference.
    """
    found = attempt("w8a8", x, lambda: _by_triton(x, values, scale, bias))
    return FORMATS["w8a8"].linear(x, values, scale, bias) if found is None else found


def _by_triton(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from accel.kernels.linear_w8a8_triton import w8a8_triton

    return w8a8_triton(x, values, scale, bias)

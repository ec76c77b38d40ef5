"""The W8A8 Triton kernels under Triton's interpreter against the torch reference."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from accel.kernels.linear_formats import FORMATS, int8_rows
from accel.kernels.linear_w8a8_triton import quantise_rows_triton, w8a8_triton

torch.manual_seed(0)
for rows, inputs, outputs, dtype in (
    (1, 64, 16, torch.float32),
    (17, 100, 75, torch.float32),
    (20, 130, 140, torch.float16),
):
    x = torch.randn(rows, inputs)
    x[:, :2] *= 20
    x[0, 3] = 0
    x = x.to(dtype)
    bias = torch.randn(outputs).to(dtype) if rows > 1 else None
    quantised, scale = quantise_rows_triton(x)
    expected, expected_scale = int8_rows(x)
    assert torch.equal(quantised, expected), (rows, inputs)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    values, scale = int8_rows(torch.randn(outputs, inputs))
    output = w8a8_triton(x, values, scale, bias)
    reference = FORMATS["w8a8"].linear(x, values, scale, bias)
    assert output.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-2}
    torch.testing.assert_close(output, reference, **close)
batched = w8a8_triton(torch.randn(2, 3, 64), *int8_rows(torch.randn(8, 64)))
assert batched.shape == (2, 3, 8)
zeros, scale = quantise_rows_triton(torch.zeros(2, 32))
assert not zeros.any() and torch.isfinite(scale).all()
"""


def test_kernels_equal_their_reference() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**__import__("os").environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]

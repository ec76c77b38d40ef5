"""The single-pass Triton kernels under Triton's interpreter against their torch references."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LINEAR = """
import torch
from accel.kernels.linear_formats import FORMATS, int8_rows
from accel.kernels.linear_w8a8_triton import quantise_rows_triton, w8a8_triton

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
DISTANCE = """
import torch
from accel.kernels import relative_l1_triton
from accel.kernels.relative_l1 import mean_distance_reference

relative_l1_triton.PROGRAMS = 3  # several blocks for each program
for shape in ((1,), (7, 33), (2, 4096), (3, 5000)):
    for dtype in (torch.float32, torch.float16):
        new, old, other = (torch.randn(3, *shape) * 30).to(dtype)
        for scale in (None, old, other):
            found = relative_l1_triton.mean_distance_triton(new, old, scale)
            exact = mean_distance_reference(
                new.double(), old.double(), None if scale is None else scale.double()
            )
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
"""
SUM = """
import torch
from accel.kernels.weighted_sum import weighted_sum_reference
from accel.kernels.weighted_sum_triton import weighted_sum_triton

for count in (2, 3, 6):
    for shape in ((5,), (3, 1000), (2, 2048)):
        for dtype in (torch.float32, torch.float16):
            tensors = list(torch.randn(count, *shape).to(dtype))
            weights = [2.0, -1.0, 0.5, 3.0, -0.25, 1.0][:count]
            found = weighted_sum_triton(weights, tensors)
            assert found.dtype == dtype
            exact = weighted_sum_reference(weights, tensors)
            close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(found, exact, **close)
"""


def test_kernels_equal_their_references() -> None:
    """In one process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    code = "import torch\ntorch.manual_seed(0)\n" + LINEAR + DISTANCE + SUM
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]

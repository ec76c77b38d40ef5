"""The doctor names every kernel with its reason, and never fails for want of a package."""

from __future__ import annotations

import importlib.util
from typing import Any

from accel import doctor
from accel.kernels import triton_device
from accel.kernels.attention_table import KERNELS
from accel.kernels.linear_formats import FORMATS


def kernels() -> tuple[dict[str, str], dict[str, str]]:
    found: dict[str, Any] = doctor.examine()["kernels"]
    (attention,) = (rows for name, rows in found.items() if name.startswith("attention on "))
    (linear,) = (rows for name, rows in found.items() if name.startswith("linear on "))
    return attention, linear


def test_every_kernel_has_a_verdict() -> None:
    attention, linear = kernels()
    assert set(attention) == set(KERNELS)
    assert set(linear) == set(FORMATS)
    assert attention["sdpa"] == "runs"
    assert all(reason.strip() for reason in (*attention.values(), *linear.values()))


def test_without_triton_and_torchao_there_are_reasons(monkeypatch) -> None:
    find = importlib.util.find_spec
    missing = {"triton", "torchao"}
    triton_device.triton_missing.cache_clear()
    triton_device.why_not.cache_clear()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    try:
        attention, linear = kernels()
    finally:
        triton_device.triton_missing.cache_clear()
        triton_device.why_not.cache_clear()
    assert "Triton is not installed" in attention["sage_int8"]
    assert "Triton is not installed" in linear["w8a8"]
    assert "torchao is not installed" in linear["int8"]

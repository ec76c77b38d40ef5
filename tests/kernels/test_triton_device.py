"""Kernels that fail leave the run to torch; where Triton serves is said."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
import torch
from tiny_pipelines import built, run

import accel
from accel.kernels import (
    linear_w8a8_triton,
    relative_l1,
    relative_l1_triton,
    sparse_blocks,
    triton_device,
    weighted_sum,
    weighted_sum_triton,
)
from accel.kernels.linear_formats import FORMATS, int8_rows
from accel.kernels.linear_w8a8 import w8a8


@pytest.fixture
def no_compiler(monkeypatch):
    """The kernels are thought to run here, and each launch fails."""

    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_device, "why_not", lambda device, capability=(8, 0): None)
    monkeypatch.setattr(triton_device, "_broken", set())
    monkeypatch.setattr(relative_l1_triton, "mean_distance_triton", fail)
    monkeypatch.setattr(weighted_sum_triton, "weighted_sum_triton", fail)
    monkeypatch.setattr(linear_w8a8_triton, "w8a8_triton", fail)


@pytest.mark.usefixtures("no_compiler")
def test_a_kernel_that_fails_is_said_once_and_left_to_torch(caplog) -> None:
    new, old = torch.randn(4, 8), torch.randn(4, 8)
    values, scale = int8_rows(torch.randn(16, 8))
    for _ in range(2):
        assert torch.equal(
            relative_l1.mean_distance(new, old), relative_l1.mean_distance_reference(new, old)
        )
        assert torch.equal(
            weighted_sum.weighted_sum([0.5, 2.0], [new, old]),
            weighted_sum.weighted_sum_reference([0.5, 2.0], [new, old]),
        )
        assert torch.equal(
            w8a8(new, values, scale), FORMATS["w8a8"].linear(new, values, scale, None)
        )
    said = [record.message for record in caplog.records]
    assert len(said) == 3 and all("Failed to find C compiler" in each for each in said)


@pytest.mark.usefixtures("no_compiler")
def test_running_out_of_memory_is_not_hidden(monkeypatch) -> None:
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(relative_l1_triton, "mean_distance_triton", fail)
    with pytest.raises(torch.OutOfMemoryError):
        relative_l1.mean_distance(torch.ones(2), torch.ones(2))


def test_sparse_attention_that_fails_stays_dense(monkeypatch, baseline, caplog) -> None:
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(sparse_blocks, "block_sparse_attention", fail)
    tiny, _ = built("ltx")
    method = accel.SpargeAttention(topk=0.3, tile=(1, 4, 4), least=16, warmup=0.0)
    with caplog.at_level(logging.WARNING), accel.patched(tiny.pipe, method):
        assert torch.equal(run(tiny), baseline("ltx"))
    assert [r.message for r in caplog.records if "C compiler" in r.message] == [
        "SpargeAttention: attention stays dense: RuntimeError: Failed to find C compiler"
    ]


def test_an_old_triton_is_refused_with_its_version(monkeypatch) -> None:
    found = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "3.2.0" if name == "triton" else found(name)
    )
    for cached in (triton_device.triton_missing, triton_device.why_not):
        cached.cache_clear()
    try:
        reason = triton_device.why_not(torch.device("cuda", 0))
    finally:
        for cached in (triton_device.triton_missing, triton_device.why_not):
            cached.cache_clear()
    assert reason == "Triton 3.2.0 is older than 3.4, which torch 2.8 brings"

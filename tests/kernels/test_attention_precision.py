"""Adaptive precision: which kernel each layer gets at which part of the schedule."""

from __future__ import annotations

import torch
from attention_fakes import EMULATED, Fake, a_call
from tiny_pipelines import built, run

import accel
from accel import Attention, Recipe
from accel.attention_calls import attention_layers
from accel.kernels.attention_precision import BUCKETS, Calibration, bucket
from accel.kernels.attention_table import KERNELS


def test_the_adaptive_choice_reads_like_its_rule() -> None:
    """The fastest within both bounds; a NaN is never within."""
    call = a_call()
    noise = torch.randn(1, 2, 64, 16)
    for name, kernel in {
        "coarse": Fake(lambda call: call.plain() + 0.5 * noise),
        "fine": Fake(lambda call: call.plain() + 1e-4 * noise),
        "nan": Fake(lambda call: call.plain() * float("nan")),
    }.items():
        KERNELS[name] = kernel
    try:
        found = Calibration(["nan", "coarse", "fine"], similarity=0.998, error=0.05)
        output = found.attend(call, 0, ["nan", "coarse", "fine"])
        assert torch.equal(output, call.plain())
        found.attend(call, 1, ["coarse"])
        assert found.plan() == {"attn": ("fine", "sdpa", "sdpa", "sdpa", "sdpa")}
        generous = Calibration(["coarse"], similarity=0.01, error=1e9)
        generous.attend(call, 4, ["coarse"])
        assert generous.plan()["attn"][4] == "coarse"
    finally:
        for name in ("coarse", "fine", "nan"):
            del KERNELS[name]


def test_a_kernel_that_fails_in_the_measuring_run_is_left_out(caplog) -> None:
    call, calls = a_call(), []

    def fail(call):
        calls.append(call)
        raise RuntimeError("Failed to find C compiler")

    KERNELS["broken"] = Fake(fail)
    try:
        found = Calibration(["broken"], similarity=0.9, error=1.0)
        for part in range(2):
            assert torch.equal(found.attend(call, part, ["broken"]), call.plain())
        assert found.plan() == {} and len(calls) == 1
        assert "broken failed: RuntimeError: Failed to find C compiler" in caplog.text
    finally:
        del KERNELS["broken"]


def test_buckets_cover_the_schedule() -> None:
    assert [bucket(place, 10) for place in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert bucket(0, 1) == 0
    assert bucket(7, 7) == BUCKETS - 1


def test_adaptive_measures_once_and_keeps_its_plan(baseline, tmp_path) -> None:
    tiny, _ = built("wan21")
    settings = {"similarity": 0.9, "error": 0.5, **EMULATED}
    patch = accel.patch(tiny.pipe, Attention("adaptive", **settings))
    assert torch.equal(run(tiny), baseline("wan21"))  # the first run measures and stays exact
    (settled,) = patch.methods
    names = {layer.name for layer in attention_layers(tiny.pipe.transformer)}
    assert set(settled.plan) == names
    assert {kernel for kernels in settled.plan.values() for kernel in kernels} == {"sage_int8_fp8"}
    second = run(tiny)
    assert not torch.equal(second, baseline("wan21"))
    patch.recipe().save(tmp_path / "r.json")
    accel.unpatch(tiny.pipe)
    with accel.patched(tiny.pipe, recipe=Recipe.load(tmp_path / "r.json")):
        assert torch.equal(run(tiny), second)


def test_adaptive_keeps_exact_what_no_kernel_bears(baseline) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, Attention("adaptive", similarity=1.0, error=0.0, **EMULATED)):
        for _ in range(2):
            assert torch.equal(run(tiny), baseline("wan21"))

"""The memory budget: refused with the number, and what is held stays within what was said."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_pipelines import Tiny, built, run

import accel

METHODS = [
    accel.PlainCycle(interval=2),
    accel.PlainCycle(interval=2, reuse=accel.Taylor(2)),
    accel.FORA(interval=2),
    accel.TaylorSeer(interval=2),
    accel.Spectrum(warmup=2),
    accel.FasterCache(start=0.1),
    accel.DiCache(threshold=1e6, warmup=0.3),
]


def least(tiny: Tiny, method: accel.method.Method) -> int:
    """The bytes below which a method is refused."""
    with (
        accel.patched(tiny.pipe, method, memory=1),
        pytest.raises(accel.AccelError, match="budget") as caught,
    ):
        run(tiny)
    return int(float(re.search(r"would hold ([0-9.e+-]+) GB", str(caught.value))[1]) * 1.01e9) + 1


@pytest.mark.parametrize("family", ["wan21", "flux", "sd3", "sd15"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_is_held_stays_within_what_was_said(method, family) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, method) as handle:
        expected = run(tiny)
        held = handle.report().memory_bytes
    budget = least(tiny, method)
    assert budget <= 5 * held
    with accel.patched(tiny.pipe, method, memory=budget) as handle:
        assert torch.isfinite(run(tiny)).all()
        assert handle.report().memory_bytes <= budget
    with accel.patched(tiny.pipe, method, memory=10 * held):
        assert torch.equal(run(tiny), expected)


@pytest.mark.parametrize("family", ["wan21", "flux", "sd15"])
def test_forecasts_that_hold_too_much_are_lowered(family, caplog) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.FORA(interval=2)):
        expected = run(tiny)
    budget = least(tiny, accel.FORA(interval=2))
    with accel.patched(tiny.pipe, accel.TaylorSeer(interval=2, warmup=1), memory=budget) as handle:
        lowered = run(tiny)
        assert handle.report().memory_bytes <= budget
        assert "E" not in "".join(handle.report().verdicts.values())
    assert torch.equal(lowered, expected)
    assert "HoldResidual() holds" in caplog.text


def test_a_refused_run_leaves_the_pipeline_patched_and_whole() -> None:
    tiny, baseline = built("wan21")
    accel.patch(tiny.pipe, accel.TaylorSeer(), memory="1 KiB")
    with pytest.raises(accel.AccelError, match="MagCache"):
        run(tiny)
    accel.patch(tiny.pipe, accel.PlainCycle(interval=1), memory="1GB")
    assert torch.equal(run(tiny), baseline)
    accel.unpatch(tiny.pipe)


@pytest.mark.parametrize("memory", ["", "2", "lots", "-1GB", "1XB", 0, -5, True, 1.5, "1.2.3GB"])
def test_wrong_budgets_are_refused(memory) -> None:
    tiny, _ = built("wan21")
    with pytest.raises(accel.AccelError, match="memory="):
        accel.patch(tiny.pipe, accel.FORA(), memory=memory)
    assert "_accel_patch" not in tiny.pipe.__dict__


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        ("wan22", [accel.TaylorSeer(interval=2, warmup=1)]),
        ("sd3", [accel.FORA(interval=2), accel.CfgCache()]),
        ("sd3", [accel.FORA(interval=2), accel.Progressive()]),
        ("sd3", [accel.FORA(interval=2), accel.CfgZeroStar(zero=0.25)]),
    ],
    ids=["two denoisers", "branches apart", "sizes", "a first step without a call"],
)
def test_whatever_is_called_first_stays_within_the_budget(family, methods) -> None:
    """Calls that are unlike the run's first one."""
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, *methods) as handle:
        run(tiny)
        held = handle.report().memory_bytes
    with (
        accel.patched(tiny.pipe, *methods, memory=held // 4),
        pytest.raises(accel.AccelError, match="budget"),
    ):
        run(tiny)
    with accel.patched(tiny.pipe, *methods, memory=8 * held) as handle:
        run(tiny)
        assert handle.report().memory_bytes <= 8 * held

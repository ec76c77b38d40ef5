"""Schedules that skip whole calls: on every pipeline, exact where nothing is skipped, and light."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import STEPS, TINY, built, run

import accel


@pytest.mark.parametrize("family", TINY)
def test_every_other_call_is_left_out(family) -> None:
    tiny, baseline = built(family)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2, whole=True)) as handle:
        changed = run(tiny)
        rows = handle.report().rows
        assert {row.blocks_run for row in rows if row.verdict == "reused"} == {0}
        assert handle.report().share_computed == pytest.approx(0.5, abs=0.13)
        assert torch.isfinite(changed).all()
        assert not torch.equal(changed, baseline)
        assert torch.equal(run(tiny), changed)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1, whole=True)):
        assert torch.equal(run(tiny), baseline)
    assert torch.equal(run(tiny), baseline)


def test_the_held_latent_stands_in_for_the_prediction() -> None:
    tiny, _ = built("wan21")
    seen, original = [], tiny.pipe.transformer.forward

    def watch(*args, **kwargs):
        seen.append(kwargs.get("timestep", args[1] if len(args) > 1 else None))
        return original(*args, **kwargs)

    with accel.patched(tiny.pipe, accel.PlainCycle(interval=4, whole=True)):
        tiny.pipe.transformer.forward = watch
        try:
            run(tiny)
        finally:
            del tiny.pipe.transformer.forward
    assert len(seen) == 2 * STEPS // 4


def test_less_is_held_than_of_the_chain() -> None:
    tiny, _ = built("wan21")
    held = []
    for whole in (False, True):
        with accel.patched(tiny.pipe, accel.PlainCycle(interval=2, whole=whole)) as handle:
            run(tiny)
            held.append(handle.report().memory_bytes)
    assert held[1] < held[0]


def test_dp_cache_measures_and_schedules_whole_calls() -> None:
    tiny, baseline = built("flux")
    with accel.patched(tiny.pipe, accel.DPCache(share=0.5, whole=True)) as handle:
        assert torch.equal(run(tiny), baseline)
        run(tiny)
        assert handle.report().share_computed == pytest.approx(0.5)
        (settled,) = handle.methods
    assert settled.whole
    assert sum(settled.schedule) == STEPS // 2


def test_two_methods_cannot_both_skip_whole_calls() -> None:
    tiny, baseline = built("wan21")
    with pytest.raises(accel.AccelError, match="whole calls of transformer"):
        accel.patch(tiny.pipe, accel.PlainCycle(whole=True), accel.EasyCache())
    assert "_accel_patch" not in tiny.pipe.__dict__
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("method", [accel.PlainCycle, accel.DPCache])
def test_wrong_settings_are_named(method) -> None:
    with pytest.raises(accel.AccelError, match="whole must be True or False"):
        method(whole=1)

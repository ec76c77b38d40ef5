"""The guard computes steps whose stand-in is broken, and leaves good runs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_calibrate_profile import profiled
from tiny_pipelines import STEPS, built, run

import accel
from accel.calibrate_replay import Replay
from accel.guard import Guard
from accel.recipe import Validity

FAMILIES = ["wan21", "flux", "sd15"]


@dataclass(frozen=True)
class Spoilt:
    """Holds the last residual, times a factor."""

    factor: float

    def depth(self, total: int) -> int:
        return 1

    def start(self, total: int) -> Any:
        history = accel.HoldResidual().start(total)
        predict = history.predict
        history.predict = lambda *args: tuple(
            None if value is None else value * self.factor for value in predict(*args)
        )
        return history


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_broken_stand_ins_are_computed_instead(family, factor, caplog) -> None:
    tiny, baseline = built(family)
    method = accel.PlainCycle(interval=2, reuse=Spoilt(factor))
    with accel.patched(tiny.pipe, method, guard=True) as handle:
        assert torch.equal(run(tiny), baseline)
        report = handle.report()
        assert report.share_computed == 1.0
        assert report.repaired == sum(row.branch is not None for row in report.rows) // 2
    assert "the step is computed" in caplog.text


def test_one_broken_picture_of_a_batch_is_seen() -> None:
    guard, known = Guard(), torch.ones(8, 4, 2, 2)
    spoilt = known.clone()
    spoilt[5] = -1.0
    branch = ("unet", "cond", 0)
    guard.computed(branch, known)
    assert guard.trusts(branch, known * 1.5, 1)
    assert not guard.trusts(branch, spoilt, 1)
    spoilt[5] = float("nan")
    assert not guard.trusts(branch, spoilt, 1)
    assert guard.repaired == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_good_runs_are_not_touched(family) -> None:
    tiny, _ = built(family)
    method = accel.PlainCycle(interval=2)
    with accel.patched(tiny.pipe, method):
        expected = run(tiny)
    with accel.patched(tiny.pipe, method, guard=True) as handle:
        assert torch.equal(run(tiny), expected)
        assert handle.report().repaired == 0
        assert len(handle.report().rows) % STEPS == 0


def test_strict_raises_and_leaves_the_pipeline_usable() -> None:
    tiny, baseline = built("wan21")
    method = accel.PlainCycle(interval=2, reuse=Spoilt(float("nan")))
    with (
        accel.patched(tiny.pipe, method, strict=True),
        pytest.raises(accel.AccelError, match="nan times"),
    ):
        run(tiny)
    assert torch.equal(run(tiny), baseline)


def test_a_calibrated_limit_is_taken(caplog) -> None:
    tiny, baseline = built("wan21")
    recipe = accel.Recipe.of((accel.PlainCycle(interval=2),))
    tight = recipe.model_copy(update={"valid_for": Validity(change=1e-9)})
    with accel.patched(tiny.pipe, recipe=tight, guard=True) as handle:
        assert torch.equal(run(tiny), baseline)
        assert handle.report().repaired > 0
    with accel.patched(tiny.pipe, recipe=recipe, guard=True) as handle:
        assert not torch.equal(run(tiny), baseline)
        assert handle.report().repaired == 0


def test_a_replay_tells_how_far_good_stand_ins_go() -> None:
    tiny, _ = built("wan21")
    replay = Replay(profiled(tiny).prompts[0])
    method = accel.PlainCycle(interval=2, whole=True)
    told = replay.largest_change(method)
    with accel.patched(tiny.pipe, method, guard=True) as handle:
        run(tiny)
        assert told == pytest.approx(handle._guard.largest, rel=0.3)
    assert replay.largest_change(accel.PlainCycle(interval=1)) == 0

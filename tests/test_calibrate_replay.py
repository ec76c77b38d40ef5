"""Replays: real methods on recorded sketches decide and cost as on the model."""

import math

import pytest
import torch
from test_calibrate_profile import profiled
from tiny_pipelines import built, run

import accel
from accel.calibrate_fit import candidates, fit, refine
from accel.calibrate_replay import USUAL, Replay
from accel.optimal_steps import solver_strides

CFG = accel.CfgCache(interval=3, start=0.1, low_gain=1.0, high_gain=1.0)


@pytest.fixture(scope="module")
def wan():
    tiny, _ = built("wan21")
    return tiny, profiled(tiny)


def test_what_skips_nothing_has_no_error(wan) -> None:
    found = Replay(wan[1].prompts[0]).predict(accel.PlainCycle(interval=1))
    assert found.error < 1e-6 and found.share == 1
    assert found.speedup == pytest.approx(1, rel=1e-6)


def test_the_error_is_the_drift_that_held_residuals_make(wan) -> None:
    record = wan[1].prompts[0]
    replay = Replay(record)
    strides = solver_strides(record.log_snr, record.prediction)
    drift, largest = torch.zeros(replay.guided.shape[1]), 0.0
    for step in range(1, record.steps, 2):  # the others are computed
        weight = strides[step] * math.exp(-step / record.steps)
        for branch, scale in (("cond", record.guidance), ("uncond", 1 - record.guidance)):
            stack = record.values[f"stack/{branch}"]
            drift += weight * scale * (stack[step - 1] - stack[step])
        largest = max(largest, float(drift.norm()))
    expected = replay.module.gain * largest / float(replay.scales[USUAL])
    assert replay.predict(accel.PlainCycle(interval=2)).error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["wan21", "sd15", "flux_cfg"])
@pytest.mark.parametrize(
    "methods",
    [(accel.PlainCycle(interval=3),), (accel.DPCache(schedule=(1, 1, 0, 0)), CFG), (CFG,)],
    ids=["cycle", "both", "guidance"],
)
def test_the_predicted_share_is_the_real_one(family, methods) -> None:
    tiny, _ = built(family)
    predicted = Replay(profiled(tiny).prompts[0]).predict(*methods)
    with accel.patched(tiny.pipe, *methods):
        run(tiny)
        real = accel.stats(tiny.pipe).share_computed
    assert predicted.share == pytest.approx(real, abs=0.01)


def test_methods_measure_themselves_on_a_replay(wan) -> None:
    found = fit(wan[1], "DPCache", 0.5)
    assert found.prediction.share == pytest.approx(0.5, abs=0.1)
    assert found.methods[0].schedule is not None
    table = fit(wan[1], "SmoothCache", 0.6).methods[0]
    assert table.errors is not None and len(table.errors["self"]) == 3
    assert fit(wan[1], "MagCache", 0.6).methods[0].ratios is not None
    assert fit(wan[1], "BAC", 0.5).methods[0].schedules is not None
    with pytest.raises(accel.AccelError, match="no setting to turn"):
        fit(wan[1], "textcache", 0.5)
    with pytest.raises(accel.AccelError, match="share"):
        fit(wan[1], "dpcache", 0)


@pytest.mark.parametrize(
    ("name", "share"), [("UniCP", 0.65), ("AdaCache", 0.5), ("LinearAG", 0.75), ("ERTACache", 0.5)]
)
def test_fitted_methods_compute_on_the_model_what_was_predicted(wan, name, share) -> None:
    tiny, profile = wan
    found = fit(profile, name, share)
    assert found.prediction.share == pytest.approx(share, abs=0.13)
    with accel.patched(tiny.pipe, *found.methods):
        run(tiny)
        real = accel.stats(tiny.pipe).share_computed
    assert real == pytest.approx(found.prediction.share, abs=0.1)


def test_candidates_combine_a_cache_with_a_guidance_policy(wan) -> None:
    found = candidates(wan[1])
    kinds = {tuple(type(method).__name__ for method in each.methods) for each in found}
    assert {("DPCache",), ("CfgCache",), ("DPCache", "CfgCache")} <= kinds
    seconds = [each.prediction.seconds for each in found]
    assert seconds == sorted(seconds)


def test_refining_never_raises_the_predicted_error(wan) -> None:
    rough = fit(wan[1], "dpcache", 0.4)
    better = refine(wan[1], rough, rounds=10)
    assert better.prediction.error <= rough.prediction.error
    assert sum(better.methods[0].schedule) == sum(rough.methods[0].schedule)

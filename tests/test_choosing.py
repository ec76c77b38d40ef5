"""A speed, a quality or a recipe becomes methods; recipes step aside where they do not hold."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_pipelines import STEPS, built, run

import accel
from accel.geometry import log_signal_to_noise
from accel.recipe import Recipe, Validity

FRONT = [
    {"entries": [{"name": "PlainCycle", "settings": {"interval": 2}}], "speedup": 1.8, "psnr": 48},
    {"entries": [{"name": "PlainCycle", "settings": {"interval": 3}}], "speedup": 2.5, "psnr": 36},
    {"entries": [{"name": "PlainCycle", "settings": {"interval": 6}}], "speedup": 4.0, "psnr": 24},
]
RECIPE = {"entries": [{"name": "PlainCycle", "settings": {"interval": 4}}], "front": FRONT}


@pytest.mark.parametrize(
    ("wish", "interval"),
    [
        ({"speedup": 1.5}, 2),
        ({"speedup": 2.5}, 3),
        ({"speedup": 3}, 6),
        ({"quality": "lossless"}, 2),
        ({"quality": "balanced"}, 3),
        ({}, 4),
    ],
)
def test_the_front_serves_the_wish(wish, interval) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, recipe=RECIPE, **wish) as handle:
        assert handle.methods == (accel.PlainCycle(interval=interval),)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"speedup": 5}, "the fastest is 4.00"),
        ({"speedup": 1}, "above 1"),
        ({"speedup": "3"}, "above 1"),
        ({"quality": "superb"}, "lossless, balanced, fast"),
        ({"quality": "fast", "speedup": 2}, "not both"),
    ],
)
def test_wrong_wishes_leave_the_pipeline_alone(wish, message) -> None:
    tiny, baseline = built("wan21")
    with pytest.raises(accel.AccelError, match=message):
        accel.patch(tiny.pipe, recipe=RECIPE, **wish)
    assert "_accel_patch" not in tiny.pipe.__dict__
    assert torch.equal(run(tiny), baseline)


def test_a_quality_nothing_reaches_names_the_best() -> None:
    tiny, _ = built("wan21")
    poor = {**RECIPE, "front": FRONT[2:]}
    with pytest.raises(accel.AccelError, match=r"closest is 24\.0 dB"):
        accel.patch(tiny.pipe, recipe=poor, quality="balanced")


def test_without_calibration_the_first_run_measures_and_says_so(caplog) -> None:
    tiny, baseline = built("flux")
    with caplog.at_level(logging.WARNING), accel.patched(tiny.pipe, speedup=2) as handle:
        assert torch.equal(run(tiny), baseline)
        assert "not proven" in caplog.text
        run(tiny)
        assert handle.report().share_computed == pytest.approx(0.5)


def test_outside_of_its_steps_an_online_method_runs(caplog) -> None:
    tiny, baseline = built("wan21")
    recipe = {**RECIPE, "valid_for": {"steps": [STEPS, STEPS], "scheduler": "UniPCMultistepX"}}
    with accel.patched(tiny.pipe, recipe=recipe) as handle:
        run(tiny)
        assert handle.report().methods == ("EasyCache",)
        assert handle.methods == (accel.PlainCycle(interval=4),)
    assert "calibrated with UniPCMultistepX" in caplog.text
    recipe["valid_for"] = {"steps": [STEPS, STEPS]}
    with accel.patched(tiny.pipe, recipe=recipe) as handle:
        first = run(tiny)
        assert handle.report().methods == ("PlainCycle",)
        run(tiny, num_inference_steps=STEPS + 1)
        assert handle.report().methods == ("EasyCache",)
        assert torch.equal(run(tiny), first)
        assert handle.report().methods == ("PlainCycle",)
    assert torch.equal(run(tiny), baseline)


def test_a_recipe_of_another_model_is_said(caplog) -> None:
    tiny, _ = built("wan21")
    recipe = accel.Recipe.of((accel.PlainCycle(interval=2),), model="UNet2DConditionModel")
    with accel.patched(tiny.pipe, recipe=recipe):
        assert "is of a UNet2DConditionModel" in caplog.text
    caplog.clear()
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2)) as handle:
        recipe = handle.recipe()
    with accel.patched(tiny.pipe, recipe=recipe):
        assert "the recipe is of" not in caplog.text


def test_outside_of_its_size_an_online_method_runs() -> None:
    tiny, baseline = built("flux")
    recipe = {**RECIPE, "valid_for": {"latents": [1, 2]}}
    with accel.patched(tiny.pipe, recipe=recipe) as handle:
        run(tiny)
        assert handle.report().methods == ("EasyCache",)
        with accel.patched(tiny.pipe, accel.EasyCache()):
            expected = run(tiny)
    with accel.patched(tiny.pipe, recipe=recipe):
        assert torch.equal(run(tiny), expected)
    assert torch.equal(run(tiny), baseline)


def test_at_other_noise_levels_an_online_method_runs(caplog) -> None:
    """The same scheduler class and steps, but another shift."""
    tiny, _ = built("wan21")
    run(tiny)
    levels = log_signal_to_noise(tiny.pipe.scheduler)
    recipe = {**RECIPE, "valid_for": {"steps": [STEPS, STEPS], "levels": levels}}
    with accel.patched(tiny.pipe, recipe=recipe) as handle:
        first = run(tiny)
        assert handle.report().methods == ("PlainCycle",)
        own = tiny.pipe.scheduler
        tiny.pipe.scheduler = type(own).from_config(own.config, shift=7.0)
        run(tiny)
        assert handle.report().methods == ("EasyCache",)
        assert "other noise levels" in caplog.text
        tiny.pipe.scheduler = own
        assert torch.equal(run(tiny), first)
        assert handle.report().methods == ("PlainCycle",)


def test_a_run_that_saved_nothing_says_so(caplog) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.FirstBlockCache(threshold=0)):
        run(tiny)
    assert "nothing was saved" in caplog.text
    caplog.clear()
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2)):
        run(tiny)
    assert "nothing was saved" not in caplog.text


def test_a_recipe_with_stages_gives_way_and_comes_back() -> None:
    """A refused run has the scheduler's own schedule, and the next one the stages' again."""
    tiny, _ = built("sd3")
    methods = (accel.PlainCycle(interval=2), accel.Progressive())
    recipe = Recipe.of(methods).model_copy(update={"valid_for": Validity(steps=(10, 30))})
    with accel.patched(tiny.pipe, accel.EasyCache()):
        plain = run(tiny)
    with accel.patched(tiny.pipe, *methods):
        staged = run(tiny, num_inference_steps=12)
    with accel.patched(tiny.pipe, recipe=recipe):
        for _ in range(2):
            assert torch.equal(run(tiny), plain)
            assert torch.equal(run(tiny, num_inference_steps=12), staged)

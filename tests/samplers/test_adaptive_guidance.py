"""LinearAG: one run is fitted, the next ones forecast what the fit explains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import built, run

import accel
from accel.samplers.adaptive_guidance import _Fit, _Forecast

NAMES = ["sd15", "sd3", "wan21", "flux_cfg"]


@pytest.mark.parametrize("name", NAMES)
def test_one_run_is_measured_and_the_next_saves(name) -> None:
    tiny, baseline = built(name)
    with accel.patched(tiny.pipe, accel.LinearAG()) as handle:
        assert torch.equal(run(tiny), baseline), "measuring changes nothing"
        assert handle.report().share_computed == 1.0
        forecast = run(tiny)
        share = handle.report().share_computed
        (settled,) = handle.methods
        run(tiny, num_inference_steps=5)
        assert handle.report().share_computed == 1.0, "other steps are measured anew"
    assert 0.5 < share < 0.8
    assert len(settled.coefficients) == tiny.call["num_inference_steps"]
    with accel.patched(tiny.pipe, settled):
        assert torch.equal(run(tiny), forecast)
    with accel.patched(tiny.pipe, accel.GuidanceInterval(highest=-1e9)):
        dropped = run(tiny)
    assert (forecast - baseline).norm() < (dropped - baseline).norm()
    assert torch.equal(run(tiny), baseline)


def test_an_exact_combination_is_found_and_forecast() -> None:
    generator = torch.Generator().manual_seed(0)
    true, steps = (0.5, 0.2, -0.1, 0.6, -0.3), 6
    cond = torch.randn(steps, 2, 3, 8, 8, generator=generator)
    uncond = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2)]
    for step in range(2, steps):
        terms = [cond[step], cond[step - 1], cond[step - 2], uncond[-1], uncond[-2]]
        uncond.append(sum(a * term for a, term in zip(true, terms, strict=True)))
    fit = _Fit()
    fit.total = steps
    for step in range(steps):
        now: Any = SimpleNamespace(step=step)
        fit.full(now, cond[step], uncond[step])
    rows = fit.solved()
    for row in rows[2:]:
        assert torch.allclose(torch.tensor(row), torch.tensor(true), atol=1e-3)
    policy = _Forecast(accel.LinearAG(share=0.0), rows)
    for step in range(steps):
        context: Any = SimpleNamespace(step=step, total=steps)
        if policy.begin(context) == "full":
            assert step < 2
            policy.full(context, cond[step], uncond[step])
        else:
            found = policy.substitute(context, cond[step])
            assert torch.allclose(found, uncond[step], atol=1e-2)


def test_coefficients_travel_in_a_recipe() -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.LinearAG()) as handle:
        run(tiny)
        recipe = handle.recipe()
        forecast = run(tiny)
    with accel.patched(tiny.pipe, *recipe.methods):
        assert torch.equal(run(tiny), forecast)


@pytest.mark.parametrize("settings", [{"interval": 1}, {"share": 2}, {"coefficients": ((1.0,),)}])
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(settings))):
        accel.LinearAG(**settings)


def test_beside_stages_each_stage_is_measured_and_forecast() -> None:
    """A stage of another size makes the policy anew in the middle of a run."""
    tiny, _ = built("flux_cfg")
    with accel.patched(tiny.pipe, accel.LinearAG(share=0.0), accel.Progressive()) as handle:
        run(tiny)
        assert handle.report().share_computed == 1.0
        run(tiny)
        assert handle.report().share_computed < 1.0


def test_two_denoisers_share_a_run() -> None:
    tiny, _ = built("wan22")
    with accel.patched(tiny.pipe, accel.LinearAG()) as handle:
        run(tiny)
        run(tiny)
        assert handle.report().share_computed < 1.0

"""Guided runs as they are recorded: both branches, all arguments, what their change counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import built, run

from accel import registry
from accel.chain import parameters
from accel.guided_runs import Pool, Recorder, flat, nested, velocity_weight


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_cfg", "sd3", "wan21"])
def test_both_branches_are_recorded(name) -> None:
    """A scale of one is the conditional branch: recorded predictions are those of that run."""
    tiny, _ = built(name)
    module = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    recorder = Recorder(module, registry.family(module))
    hook = module.register_forward_hook(recorder, with_kwargs=True)
    run(tiny, num_inference_steps=3)
    hook.remove()
    assert len(recorder.states) == 3
    inputs, cond, uncond = recorder.states[-1]
    assert not torch.equal(cond, uncond)
    with torch.no_grad():
        again = module(**nested({**inputs, "return_dict": False}))[0]
    assert torch.allclose(again, cond, atol=1e-5)
    assert set(nested(inputs)) <= set(parameters(module))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21"])
def test_a_led_run_goes_where_it_is_led(name) -> None:
    """Led by the conditional branch, at any scale, it is the run without guidance."""
    tiny, _ = built(name)
    module = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    scale = "true_cfg_scale" if name == "flux_cfg" else "guidance_scale"
    asked: list[dict[str, Any]] = []

    def lead(inputs: dict[str, Any]) -> torch.Tensor:
        asked.append(inputs)
        return module(**nested({**inputs, "return_dict": False}))[0]

    recorder = Recorder(module, registry.family(module), lead)
    hook = module.register_forward_hook(recorder, with_kwargs=True)
    led = run(tiny, num_inference_steps=3, **{scale: 6.0})
    hook.remove()
    plain = run(tiny, num_inference_steps=3, **{scale: 1.0})
    guided = run(tiny, num_inference_steps=3, **{scale: 6.0})
    assert len(recorder.states) == len(asked) == 3
    assert torch.allclose(led, plain, atol=1e-4)
    assert not torch.allclose(led, guided, atol=1e-3)
    _, cond, uncond = recorder.states[-1]
    assert not torch.equal(cond, uncond), "what is recorded is still both branches"


def test_what_guidance_changes_is_weighted_as_a_velocity() -> None:
    pipe = built("sd15")[0].pipe
    timesteps = torch.tensor([0.0, 500.0, 999.0])
    weight = velocity_weight(pipe.scheduler, timesteps)
    kept = pipe.scheduler.alphas_cumprod[timesteps.long()]
    assert torch.allclose(weight, 1 / kept.clamp(min=1e-3))
    assert velocity_weight(built("wan21")[0].pipe.scheduler, timesteps).eq(1).all()
    pool = Pool(cond=torch.ones(3, 2), uncond=torch.zeros(3, 2), weight=weight)
    assert torch.equal(pool.change, weight)


def test_arguments_are_taken_apart_and_put_together() -> None:
    arguments = {"sample": 1, "added": {"text": 2, "ids": 3}, "timestep": 4}
    apart = flat(arguments)
    assert apart == {"sample": 1, "added.text": 2, "added.ids": 3, "timestep": 4}
    assert nested(apart) == arguments

"""Where in its schedule a run is, and how noisy each step is."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel.geometry import first_place, log_signal_to_noise, predicted


def seen_places(pipe: Any, **call: Any) -> list[tuple[float, float]]:
    """For each step its timestep, and the one that methods were told."""
    found = []

    def note(pipe: Any, step: int, t: Any, tensors: Any) -> Any:
        clock = pipe._accel_patch._clock
        found.append((float(t), clock.timesteps[clock.start + step]))
        return tensors

    with accel.patched(pipe, accel.PlainCycle(1)):
        pipe(**call, callback_on_step_end=note)
    return found


@pytest.mark.parametrize("scheduler", [d.EulerDiscreteScheduler, d.DDIMScheduler])
def test_the_first_part_of_a_schedule_is_its_first_part(scheduler) -> None:
    """SDXL's base model with a refiner after it."""
    tiny = TINY["sdxl"]()
    tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config)
    call = tiny.call | {"generator": torch.Generator().manual_seed(0)}
    found = seen_places(tiny.pipe, **call, denoising_end=0.6)
    assert 0 < len(found) < tiny.call["num_inference_steps"]
    assert all(real == told for real, told in found)


@pytest.mark.parametrize("scheduler", [d.EulerDiscreteScheduler, d.DDIMScheduler])
def test_image_to_image_is_the_last_part(scheduler) -> None:
    tiny, _ = built("sd15")
    parts = tiny.pipe.components | {"scheduler": scheduler()}
    pipe = d.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 16, 16)
    call = {"image": image, "strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
    found = seen_places(pipe, prompt="a cat", **call)
    assert len(found) == 4
    assert all(real == told for real, told in found)


def test_a_part_in_the_middle_is_found_by_its_timestep() -> None:
    scheduler = d.DDIMScheduler()
    scheduler.set_timesteps(10)
    assert first_place(scheduler, 10, 5) == 0
    assert first_place(scheduler, 4, scheduler.timesteps[3]) == 3
    assert first_place(scheduler, 4, scheduler.timesteps[6]) == 6


def test_inverted_sigmas_begin_with_noise() -> None:
    """Mochi's scheduler counts from 0, which is noise, to 1."""
    plain, inverted = (
        d.FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted) for inverted in (False, True)
    )
    for scheduler in (plain, inverted):
        scheduler.set_timesteps(8)
        levels = log_signal_to_noise(scheduler)
        assert levels == sorted(levels)
    assert inverted.timesteps[0] < inverted.timesteps[-1]
    tiny, _ = built("mochi")
    before = tiny.pipe.scheduler
    tiny.pipe.scheduler = inverted
    try:
        with accel.patched(tiny.pipe, accel.GuidanceInterval(highest=0.0)) as handle:
            run(tiny)
            left_out = [row.step for row in handle.report().rows if row.verdict == "left out"]
    finally:
        tiny.pipe.scheduler = before
    assert left_out
    assert min(left_out) > 0


@pytest.mark.parametrize("name", ["flux", "qwen_image", "ltx", "wan21", "cogvideox", "sd3"])
def test_all_channels_of_a_plain_latent_are_predicted(name) -> None:
    """Qwen-Image's configuration counts those of a latent pixel, not of a token."""
    tiny, _ = built(name)
    module, seen = tiny.pipe.transformer, []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        latent = (*args, kwargs.get("hidden_states"))[0]
        family = accel.registry.family(module)
        axis, count = predicted(module, family, latent)
        seen.append((latent.shape[axis], count, output[0].shape[axis]))

    hook = module.register_forward_hook(note, with_kwargs=True)
    try:
        run(tiny, num_inference_steps=2)
    finally:
        hook.remove()
    assert all(given == count == made for given, count, made in seen)

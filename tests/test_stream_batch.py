"""A stream batch makes of every frame what the same levels make of it alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

import accel
from accel.stream_batch import Levels, StreamBatch

TIMESTEPS = (799, 599, 399, 199)


def network(latents, timesteps, negative):
    """Row-wise and non-linear; the negative prompt turns the sign of a part."""
    sign = torch.tensor([-1.0 if each else 1.0 for each in negative]).view(-1, 1, 1, 1)
    return torch.tanh(latents) + sign * 0.1 * (timesteps.view(-1, 1, 1, 1) / 1000)


def stream(guidance="none", timesteps=TIMESTEPS, **options) -> StreamBatch:
    found = StreamBatch(network, Levels.of(DDIMScheduler(), timesteps), guidance, 1.5, **options)
    found.fix_noise(torch.empty(1, 4, 3, 3), seed=0)
    return found


def frames(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 4, 3, 3, generator=generator) for _ in range(count)]


def alone(frame: torch.Tensor, **options) -> torch.Tensor:
    single = stream(**options)
    result = single.push(frame)
    return single.drain() if result is None else result


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("guidance", ["none", "self", "onetime", "full"])
def test_frames_do_not_touch_each_other(guidance, together) -> None:
    batch, given = stream(guidance, together=together), frames(7)
    made = [each for frame in given if (each := batch.push(frame)) is not None]
    assert len(made) == 7 - len(TIMESTEPS) + 1
    while (left := batch.drain()) is not None:
        made.append(left)
    assert len(made) == len(given)
    for frame, result in zip(given, made, strict=True):
        assert torch.allclose(result, alone(frame, guidance=guidance), atol=1e-6)


def test_a_level_is_the_step_of_lcm_scheduler() -> None:
    scheduler = LCMScheduler()
    levels = Levels.of(scheduler, (499,))
    single = StreamBatch(network, levels, "none")
    single.fix_noise(torch.empty(1, 4, 3, 3), seed=0)
    (frame,) = frames(1)
    noisy = scheduler.add_noise(frame, single.noise, torch.tensor([499]))
    scheduler.set_timesteps(timesteps=[499])
    expected = scheduler.step(network(noisy, torch.tensor([499]), [False]), 499, noisy).denoised
    assert torch.allclose(single.push(frame), expected, atol=1e-5)


def test_velocity_and_noise_predictions_agree() -> None:
    levels = Levels.of(DDIMScheduler(), TIMESTEPS)

    def as_velocity(latents, timesteps, negative):
        noise = network(latents, timesteps, negative)
        rows = [TIMESTEPS.index(int(t)) for t in timesteps]
        return (noise - levels.sigma[rows] * latents) / levels.alpha[rows]

    velocity = StreamBatch(as_velocity, levels, "self", 1.5, velocity=True)
    velocity.fix_noise(torch.empty(1, 4, 3, 3), seed=0)
    (frame,) = frames(1)
    velocity.push(frame)
    assert torch.allclose(velocity.drain(), alone(frame, guidance="self"), atol=1e-5)


def test_self_guidance_needs_no_call_of_its_own() -> None:
    rows = []

    def counted(latents, timesteps, negative):
        rows.append(len(latents))
        return network(latents, timesteps, negative)

    for guidance, expected in (("none", 4), ("self", 4), ("onetime", 5), ("full", 8)):
        batch = StreamBatch(counted, Levels.of(DDIMScheduler(), TIMESTEPS), guidance, 1.5)
        batch.fix_noise(torch.empty(1, 4, 3, 3), seed=0)
        for frame in frames(6):
            batch.push(frame)
        assert rows[-1] == expected
    assert stream("full", (499,)).guidance == "full"
    assert StreamBatch(network, Levels.of(DDIMScheduler(), (1,)), "full", 1.0).guidance == "none"


@pytest.mark.parametrize("wrong", [(), (5, 9), (5, 5), (1000,), (-1,), (0,)])
def test_wrong_levels_are_named(wrong) -> None:
    with pytest.raises(accel.AccelError, match="falling"):
        Levels.of(DDIMScheduler(), wrong)


def test_flow_schedulers_and_unknown_guidance_are_refused() -> None:
    with pytest.raises(accel.AccelError, match="FlowMatchEulerDiscreteScheduler is no scheduler"):
        Levels.of(FlowMatchEulerDiscreteScheduler(), (500,))
    with pytest.raises(accel.AccelError, match="none, self, onetime, full"):
        stream("half")

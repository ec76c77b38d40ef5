"""DLFR-VAE: rate 1 is the untouched VAE, lower rates keep length and still pictures."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, WanVideoToVideoPipeline
from tiny_pipelines import built

from accel import AccelError, model_zoo
from accel.hooks import PRIVATE
from accel.samplers.dlfr_vae import DLFRVAE, _calls, _last_halving, _repeats, complexity

WHOLE, HALF, QUARTER = (-3.0, -3.0), (-3.0, 3.0), (3.0, 3.0)
"""Thresholds that give every chunk one rate."""
CONFIGS: dict[str, dict[str, Any]] = {
    "factor2": {"dim_mult": [1, 1], "temperal_downsample": [True], "scale_factor_spatial": 2},
    "wan21": {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]},
    "wan22": {
        **{"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]},
        **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    },
}


@functools.cache
def vae(name: str) -> Any:
    """A random-weight VAE."""
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    made = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **statistics, **CONFIGS[name])
    return made.eval().requires_grad_(False)


@functools.cache
def trained() -> Any:
    found = AutoencoderKLWan.from_pretrained(model_zoo.path("emoji-video") / "vae")
    return found.eval().requires_grad_(False)


def clip(frames: int, still: set[int] = frozenset(), batch: int = 1, seed: int = 0) -> torch.Tensor:
    """(batch, 3, frames, 16, 16): noise, which does not change between the frames in `still`."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(batch, 3, 16, 16, generator=generator)]
    for frame in range(1, frames):
        new = torch.rand(batch, 3, 16, 16, generator=generator)
        parts.append(parts[-1] if frame in still else new)
    return torch.stack(parts, 2) * 2 - 1


def sliding(frames: int) -> torch.Tensor:
    """A bright square on a dark ground, which moves by two pixels a frame."""
    video = torch.full((1, 3, frames, 32, 32), -0.5)
    for frame in range(frames):
        first = 2 * frame % 24
        video[:, :, frame, 8:20, first : first + 8] = 0.7
    return video


def mode(model: Any, video: torch.Tensor) -> torch.Tensor:
    return model.encode(video).latent_dist.mode()


def psnr(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(-10 * torch.log10(((one - two) / 2).square().mean()))


@pytest.mark.parametrize("name", CONFIGS)
def test_rate_one_is_the_untouched_vae(name) -> None:
    video, model = clip(33, batch=2), vae(name)
    latents, rates = DLFRVAE(model, WHOLE).encode(video)
    assert rates == [(16, 1.0), (16, 1.0)]
    assert torch.equal(latents, mode(model, video))
    assert torch.equal(DLFRVAE(model).decode(latents, rates), model.decode(latents).sample)


def test_rate_one_of_the_trained_vae() -> None:
    video, model = sliding(17), trained()
    latents, rates = DLFRVAE(model, WHOLE).encode(video)
    assert torch.equal(latents, mode(model, video))
    assert torch.equal(DLFRVAE(model).decode(latents, rates), model.decode(latents).sample)


@pytest.mark.parametrize("thresholds", [WHOLE, HALF, (0.1, 0.1)])
def test_tiles_and_slices(thresholds) -> None:
    """Sliced batches are equal to whole ones; tiles to the VAE's own, and of the right length."""
    video, model = clip(17, still=set(range(1, 9)), batch=2), vae("factor2")
    dlfr = DLFRVAE(model, thresholds, chunk=8)
    latents, rates = dlfr.encode(video)
    decoded = dlfr.decode(latents, rates)
    model.enable_slicing()
    try:
        assert torch.allclose(dlfr.encode(video)[0], latents, atol=1e-4)
        assert torch.allclose(dlfr.decode(latents, rates), decoded, atol=1e-4)
    finally:
        model.disable_slicing()
    model.enable_tiling(12, 12, 8, 8)
    try:
        tiled, _ = dlfr.encode(video)
        assert tiled.shape == latents.shape
        assert dlfr.decode(latents, rates).shape == video.shape
        if thresholds == WHOLE:
            assert torch.equal(tiled, mode(model, video))
    finally:
        model.use_tiling = False


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("thresholds", "rate"), [(WHOLE, 1), (HALF, 2), (QUARTER, 4)])
def test_latent_frames_go_by_the_rate(name, thresholds, rate) -> None:
    dlfr = DLFRVAE(vae(name), thresholds)
    latents, rates = dlfr.encode(clip(33))
    assert {found for _, found in rates} == {1 / rate}
    assert latents.shape[2] == 1 + 32 // dlfr.factor // rate


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [1, 2, 10, 23, 33])
def test_clips_keep_their_length(name, frames) -> None:
    video = clip(frames, still=set(range(1, 17)), batch=2)
    for thresholds in ((0.1, 0.1), HALF, QUARTER):
        dlfr = DLFRVAE(vae(name), thresholds)
        latents, rates = dlfr.encode(video)
        kept = json.loads(json.dumps(rates))
        again = DLFRVAE(vae(name), chunk=32).decode(latents, kept)
        assert again.shape == video.shape
        assert torch.isfinite(again).all()


def test_calls_hold_a_chunks_frames_and_no_others() -> None:
    """16 frames at ½, then 13 at ¼ (16 with the last one repeated), of a VAE of factor 4."""
    rates = [(16, 0.5), (13, 0.25)]
    assert _calls(rates) == [(1, 1), (8, 2), (8, 2), (16, 4)]
    assert _repeats(rates, 4) == [1, 2, 2, 4]
    assert _repeats([(12, 0.25)], 4) == [1, 3]
    assert _repeats([(12, 0.25)], 2) == [1, 4, 2]


def test_pairs_are_averaged_and_repeated_at_the_two_places() -> None:
    """Wan 2.1 at ½: 8 frames a call, whose two latent frames are one between the places."""
    model, seen = vae("wan21"), {}
    halving = _last_halving(model)
    after = model.encoder.down_blocks[list(model.encoder.down_blocks).index(halving) + 1]
    watched = {
        "halved": halving.register_forward_hook(lambda _, args, out: seen["halved"].append(out)),
        "after": after.register_forward_pre_hook(lambda _, args: seen["after"].append(args[0])),
        "doubled": model.decoder.up_blocks[0]
        .upsamplers[0]
        .register_forward_pre_hook(lambda _, args: seen["doubled"].append(args[0])),
    }
    seen |= {name: [] for name in watched}
    try:
        dlfr = DLFRVAE(model, HALF)
        dlfr.decode(*dlfr.encode(clip(17)))
    finally:
        for handle in watched.values():
            handle.remove()
    assert [x.shape[2] for x in seen["halved"]] == [1, 2, 2]
    for full, averaged in zip(seen["halved"], seen["after"], strict=True):
        assert torch.allclose(averaged, full.mean(2, keepdim=True), atol=1e-6)
    assert [x.shape[2] for x in seen["doubled"]] == [1, 2, 2]
    assert all(torch.equal(x[:, :, 0], x[:, :, -1]) for x in seen["doubled"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_rate_leaves_what_came_before(name) -> None:
    video = clip(49, still=set(range(17, 33)))
    dlfr = DLFRVAE(vae(name), (0.1, 0.1))
    latents, rates = dlfr.encode(video)
    assert [rate for _, rate in rates] == [1, 0.25, 1]
    before, shorter = dlfr.encode(video[:, :, :17])
    assert torch.allclose(latents[:, :, : before.shape[2]], before, atol=1e-6)
    decoded = dlfr.decode(latents, rates)
    assert torch.allclose(decoded[:, :, :17], dlfr.decode(before, shorter), atol=1e-6)


def test_another_clips_plan_can_be_followed() -> None:
    dlfr, plan = DLFRVAE(vae("factor2"), HALF), [(16, 0.25), (16, 1)]
    latents, rates = dlfr.encode(clip(33), plan)
    assert rates == plan
    assert latents.shape[2] == 1 + 2 + 8
    with pytest.raises(AccelError, match="not a plan for 17 frames"):
        dlfr.encode(clip(17), plan)


def test_a_still_clip_is_as_good_at_a_quarter() -> None:
    still = sliding(1).expand(-1, -1, 9, -1, -1)
    results = []
    for thresholds in (WHOLE, DLFRVAE(trained()).thresholds):
        dlfr = DLFRVAE(trained(), thresholds, chunk=8)
        latents, rates = dlfr.encode(still)
        results.append((latents.shape[2], psnr(dlfr.decode(latents, rates), still)))
    assert [frames for frames, _ in results] == [5, 2]
    assert results[1][1] > results[0][1] - 0.5


def test_moving_chunks_keep_all_frames() -> None:
    dlfr = DLFRVAE(trained(), chunk=8)
    moving = sliding(17)
    assert dlfr.rates(moving) == [(8, 1.0), (8, 1.0)]
    half = torch.cat((moving[:, :, :9], moving[:, :, [8]].expand(-1, -1, 8, -1, -1)), 2)
    assert dlfr.rates(half) == [(8, 1.0), (8, 0.25)]
    both = torch.cat((half, moving))
    assert dlfr.rates(both) == [(8, 1.0), (8, 1.0)], "the liveliest sample decides"
    assert complexity(half[:, :, 9:]) == pytest.approx(0, abs=1e-5)
    assert complexity(both) == pytest.approx(complexity(moving))


def parts(model: Any) -> list[Any]:
    return [type(module) for module in model.modules()]


def test_nothing_is_left_behind() -> None:
    model = vae("wan21")
    before = parts(model)
    dlfr = DLFRVAE(model, HALF)
    latents, rates = dlfr.encode(clip(17))
    dlfr.decode(latents, rates)
    with pytest.raises(RuntimeError):  # a failure in the middle
        dlfr.encode(clip(17).double())
    with pytest.raises(RuntimeError):
        dlfr.decode(latents.double(), rates)
    assert parts(model) == before
    assert not [m for m in model.modules() if set(PRIVATE) & set(m.__dict__)]
    assert dlfr.decode(latents, rates).shape[2] == 17


@pytest.mark.parametrize(("thresholds", "frames"), [(WHOLE, 9), (HALF, 5), (QUARTER, 3)])
def test_video_to_video_of_fewer_latent_frames(thresholds, frames) -> None:
    """As the method's page does it; at rate 1 the pipeline's own result."""
    tiny, _ = built("wan21")
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: getattr(tiny.pipe, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = tiny.pipe.encode_prompt("a cat", max_sequence_length=16)
    call = {"height": 16, "width": 16, "num_inference_steps": 4, "strength": 0.5}
    call |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    video = clip(17)
    dlfr = DLFRVAE(pipe.vae, thresholds)
    latents, rates = dlfr.encode(video)
    assert latents.shape[2] == frames
    pipe.scheduler.set_timesteps(4)
    sigma = pipe.scheduler.timesteps[2] / 1000
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = (1 - sigma) * latents + sigma * noise
    found = pipe(latents=noisy, output_type="latent", **call).frames
    assert found.shape == latents.shape
    assert dlfr.decode(found, rates).shape == video.shape
    if thresholds == WHOLE:
        pictures = [video[0].transpose(0, 1) / 2 + 0.5]
        own = {"generator": torch.Generator().manual_seed(1), "output_type": "latent"}
        assert torch.allclose(pipe(video=pictures, **own, **call).frames, found, atol=1e-4)


def test_wrong_models_settings_and_shapes_are_refused() -> None:
    with pytest.raises(AccelError, match=r"not a AutoencoderKL$"):
        DLFRVAE(AutoencoderKL())
    flat = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1], temperal_downsample=[False])
    with pytest.raises(AccelError, match="does not compress time"):
        DLFRVAE(flat)
    model = vae("wan21")
    wrong: list[dict[str, Any]] = [
        {"thresholds": (0.2, 0.1)},
        {"thresholds": (0.1,)},
        {"thresholds": 0.1},
        {"thresholds": (0.1, "x")},
        {"chunk": 8},
        {"chunk": 24},
    ]
    for settings in wrong:
        with pytest.raises(AccelError, match="must be"):
            DLFRVAE(model, **settings)
    assert DLFRVAE(vae("factor2"), chunk=8).chunk == 8
    dlfr = DLFRVAE(model)
    for shape in ((3, 9, 32, 32), (1, 4, 9, 32, 32), (1, 3, 0, 32, 32)):
        with pytest.raises(AccelError, match="batch, 3, frames"):
            dlfr.encode(torch.zeros(shape))
    latents, rates = dlfr.encode(clip(17))
    with pytest.raises(AccelError, match="make 5 latent frames"):
        dlfr.decode(latents[:, :, :3], rates)
    for chunk in ((16, 0.3), (0, 1.0), (1.5, 1.0)):
        with pytest.raises(AccelError, match="not a chunk"):
            dlfr.decode(latents, [chunk])
    with pytest.raises(AccelError, match="not a chunk"):
        dlfr.decode(latents, [(15, 1.0), (4, 1.0)])

"""LSSGen: exact at one size, its transition lands on the level, foreign upsamplers are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import STEPS, built, run

import accel
from accel import AccelError, LSSGen, model_zoo
from accel.clock import StepClock
from accel.crossing import Crossing
from accel.latent_upsampler import LatentUpsampler, UpsamplerConfig, fingerprint
from accel.layout import Form, Layout
from accel.noise_levels import NoiseLevels
from accel.samplers.lssgen import _Stages
from accel.staging import StagedRun
from demos.zoo import upsampler as training

FAMILIES = ["flux", "wan21", "wan22", "sd15"]
LEVELS = {
    "flow": NoiseLevels("flow", "velocity", tuple(i / 10 for i in range(10, -1, -1)), 1000),
    "vp": NoiseLevels("vp", "epsilon", (14.6, 4.0, 2.0, 0.5, 0.0), 1000, (0.03, 1.0, 14.6)),
    "ve": NoiseLevels("ve", "epsilon", (14.6, 4.0, 2.0, 0.5, 0.0), 1000, (0.03, 1.0, 14.6)),
}


def random_upsampler(channels: int, base: tuple[float, ...] = ()) -> LatentUpsampler:
    torch.manual_seed(0)
    net = LatentUpsampler(UpsamplerConfig(channels, base, width=8))
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return net.requires_grad_(False)


def saved(name: str, folder: Path) -> str:
    """The folder of a random upsampler for a tiny pipeline's VAE."""
    vae = built(name)[0].pipe.vae
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    random_upsampler(channels, fingerprint(vae)).save(folder, {})
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_stage_is_the_untouched_run(name, tmp_path) -> None:
    tiny, baseline = built(name)
    method = LSSGen(scales=(1.0,), shares=(1.0,), upsampler=saved(name, tmp_path))
    with accel.patched(tiny.pipe, method):
        assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_run_with_the_same_number_of_steps(name, tmp_path) -> None:
    """Two sizes, the user's count of steps; the same twice; undone bit by bit."""
    tiny, baseline = built(name)
    seen: list[tuple[int, ...]] = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        return {}

    with accel.patched(tiny.pipe, LSSGen(upsampler=saved(name, tmp_path))):
        first = run(tiny, callback_on_step_end=callback)
        assert torch.equal(run(tiny), first)
    assert seen == [tuple(baseline.shape)] * STEPS
    assert torch.isfinite(first).all()
    assert not torch.equal(first, baseline)
    assert torch.equal(run(tiny), baseline)


def bound(method: LSSGen, channels: int = 4) -> tuple[_Stages, StagedRun]:
    """A method with a random upsampler and its run over 256 × 256 places, outside a pipeline."""
    clock = StepClock()
    stages = _Stages(method, random_upsampler(channels), clock)
    run = StagedRun(stages, "LSSGen")
    run._full = (1, 256, 256)
    clock.staging = run
    return stages, run


def test_low_stages_end_clean_and_later_ones_begin_with_start_of_their_schedule() -> None:
    method = LSSGen(scales=(0.25, 0.5, 1.0), shares=(0.2, 0.3, 0.5), start=0.7)
    made = bound(method)[0].stages(LEVELS["flow"])
    assert [each.scale for each in made] == [0.25, 0.5, 1.0]
    assert [len(each.sigmas) - 1 for each in made] == [2, 3, 5]
    assert [each.sigmas[-1] for each in made] == [0.0, 0.0, 0.0]
    quarter = 0.5 * 0.7 / (1 + (0.5 - 1) * 0.7)  # 0.7, shifted for a quarter of the tokens
    assert [each.sigmas[0] for each in made] == pytest.approx([1.0, quarter, 0.7])
    for each in made:
        assert list(each.sigmas) == sorted(set(each.sigmas), reverse=True)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_after_the_transition_the_state_has_the_next_stages_level(levels) -> None:
    stages, run = bound(LSSGen())
    before, after = stages.stages(levels)
    full = (1, 256, 256)
    clean = 1 + torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    layout, form = Layout.resized(full, (1, 128, 128)), Form(packed=False, flat=True)
    run.white = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(1))
    end = Crossing(1, levels, before, after, layout, form, clean, clean, run)
    layout, state = stages.cross(end)
    assert layout.whole
    a, s = levels.weights(after.sigmas[0])
    doubled = stages.upsampler(clean)
    assert state.shape == doubled.shape == (1, 4, 256, 256)
    noise = (state - a * doubled) / s
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.var()) == pytest.approx(1, rel=0.01)
    assert float(state.mean()) == pytest.approx(a * float(doubled.mean()), abs=0.01 * s)
    wanted = a**2 * float(doubled.var()) + s**2
    assert float(state.var()) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["flux", "wan21", "sd15"])
def test_rows_of_a_batch_follow_their_own_generators(name, tmp_path) -> None:
    tiny, _ = built(name)
    rows = {"prompt": ["a cat", "zebra"]}
    if "negative_prompt" in tiny.call:
        rows["negative_prompt"] = ["dog", "horse"]
    with accel.patched(tiny.pipe, LSSGen(upsampler=saved(name, tmp_path))):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        both = run(tiny, **rows, generator=generators)
        second = {key: value[1:] for key, value in rows.items()}
        one = run(tiny, **second, generator=[torch.Generator().manual_seed(1)])
    assert (both[1:] - one).abs().max() <= 1e-3 * one.abs().max()


def test_beside_a_cache_and_a_guidance_policy(tmp_path) -> None:
    """Each stage begins with a computed step: steps 0 and 3 of 8."""
    tiny, _ = built("flux_cfg")
    methods = (LSSGen(upsampler=saved("flux_cfg", tmp_path)), accel.PlainCycle(interval=2))
    with accel.patched(tiny.pipe, *methods, accel.CfgCache(interval=3, start=0.0)) as handle:
        assert torch.isfinite(run(tiny)).all()
        rows = handle.report().rows
    assert {row.verdict for row in rows if row.step in (0, 3)} == {"computed"}
    assert len({row.verdict for row in rows}) > 1


def test_untrained_it_is_the_bilinear_resize_and_frames_are_independent() -> None:
    net = LatentUpsampler(UpsamplerConfig(4, (), width=8))
    clip = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(clip), training.resized(clip, 2.0, "bilinear"))
    net = random_upsampler(4)
    assert net(clip).shape == (2, 4, 3, 12, 10)
    for frame in range(3):
        assert torch.allclose(net(clip)[:, :, frame], net(clip[:, :, frame]), atol=1e-6)
    assert net(clip.bfloat16()).dtype == torch.bfloat16


def test_a_saved_upsampler_is_loaded_in_half_precision(tmp_path) -> None:
    net = random_upsampler(4, (0.5, 0.25))
    net.save(tmp_path, {"steps": 1})
    again = LatentUpsampler.load(tmp_path)
    assert again.config == net.config
    planes = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(again(planes), net(planes), atol=1e-2)


def test_the_fingerprint_outlives_half_precision_but_no_other_weights() -> None:
    vae = built("sd15")[0].pipe.vae
    net = random_upsampler(4, fingerprint(vae))
    copy = type(vae).from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    net.check(copy.half())
    net.check(copy.to("meta"))
    other = type(vae).from_config(vae.config)
    with pytest.raises(AccelError, match="another VAE"):
        net.check(other)


def test_wrong_upsamplers_are_refused_before_the_first_step(tmp_path) -> None:
    tiny, baseline = built("sd15")
    with pytest.raises(AccelError, match="no folder adapters/lssgen"):
        accel.patch(tiny.pipe, LSSGen())
    with pytest.raises(AccelError, match="no latent upsampler can be loaded"):
        accel.patch(tiny.pipe, LSSGen(upsampler=str(tmp_path)))
    saved("sd15", tmp_path)
    config = json.loads((tmp_path / "upsampler.json").read_text())
    (tmp_path / "upsampler.json").write_text(json.dumps({**config, "channels": 5}))
    with pytest.raises(AccelError, match="no latent upsampler"):
        accel.patch(tiny.pipe, LSSGen(upsampler=str(tmp_path)))
    (tmp_path / "upsampler.safetensors").write_bytes(b"nonsense")
    with pytest.raises(AccelError, match="no latent upsampler"):
        accel.patch(tiny.pipe, LSSGen(upsampler=str(tmp_path)))
    saved("sd3", tmp_path)
    calls: list[int] = []
    hook = tiny.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    method = LSSGen(upsampler=str(tmp_path))
    with accel.patched(tiny.pipe, method), pytest.raises(AccelError, match="another VAE"):
        run(tiny)
    hook.remove()
    assert not calls
    assert torch.equal(run(tiny), baseline)
    with pytest.raises(AccelError, match="4 latent channels, not 6"):
        random_upsampler(4)(torch.zeros(1, 6, 4, 4))


@pytest.mark.parametrize(
    ("name", "method", "changes", "message"),
    [
        ("flux", {}, {"height": 20, "width": 20}, "must be whole"),
        ("flux", {}, {"num_inference_steps": 1}, "too short"),
        ("sd15", {"scales": (0.125, 0.25, 0.5, 1.0), "shares": (0.25,) * 4}, {}, "divisible by 2"),
    ],
)
def test_wrong_sizes_are_refused(name, method, changes, message, tmp_path) -> None:
    tiny, _ = built(name)
    method = LSSGen(**method, upsampler=saved(name, tmp_path))
    with accel.patched(tiny.pipe, method), pytest.raises(AccelError, match=f"LSSGen.*{message}"):
        run(tiny, **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": (0.25, 1.0)},
        {"scales": (0.5, 0.5, 1.0), "shares": (0.2, 0.2, 0.6)},
        {"shares": (0.5, 0.6)},
        {"start": 0.0},
        {"start": 1.0},
        {"upsampler": 3},
        {"positions": "middle"},
    ],
)
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(AccelError):
        LSSGen(**wrong)


def shown(model: str) -> torch.Tensor:
    """What the model itself made, from its contact sheet; no upsampler has seen it."""
    with Image.open(model_zoo.path(model) / "contact_sheet.png") as file:
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())[::2, ::2]
    size = model_zoo.settings(model)["call"]["height"]
    rows = sheet.float().permute(2, 0, 1).unfold(1, size, size).unfold(2, size, size) / 127.5 - 1
    if model_zoo.settings(model)["fps"]:
        return rows.permute(1, 0, 2, 3, 4)
    return rows.flatten(1, 2).transpose(0, 1)


@pytest.mark.parametrize("model", training.MODELS)
@torch.no_grad()
def test_the_zoos_upsamplers_beat_plain_resizes_on_pictures_they_have_not_seen(model) -> None:
    latents, pictures = training.Latents(model), shown(model)[:6]
    folder = model_zoo.path(model) / training.FOLDER
    net = LatentUpsampler.load(folder)
    net.check(latents.vae)
    small, large = latents.pair(pictures)

    def errors(made: torch.Tensor) -> tuple[float, float]:
        decoded = latents.decode(made).clamp(-1, 1)
        return float((made - large).square().mean()), float((decoded - pictures).square().mean())

    learned = errors(net(small))
    for mode in ("nearest", "bilinear", "bicubic"):
        plain = errors(training.resized(small, 2.0, mode))
        assert learned[0] < 0.6 * plain[0]
        assert learned[1] < 0.9 * plain[1]
    assert (folder / "upsampler.safetensors").stat().st_size < 300_000

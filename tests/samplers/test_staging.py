"""Stages of different size on every family: exact where nothing changes, refused where unknown."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import diffusers as d
import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY, built, run

import accel
from accel import AccelError, BottleneckSampling, Progressive, generate, model_zoo
from accel.attention_calls import AttentionCall
from accel.family import Family
from accel.layout import Form, Layout
from accel.staging import StagedRun
from accel.text_bias import biased

LARGER = {
    "cogvideox": {"height": 32, "width": 32},
    "mochi": {"height": 32, "width": 32},
    "ltx": {"height": 64, "width": 64},
}
STAGED = [name for name in TINY if name != "dit"]
SAMPLERS = [
    BottleneckSampling(up=1.5),
    Progressive(shares=(0.25, 0.75), positions="spread", renoise=1.5),
]


@pytest.mark.parametrize("name", STAGED)
def test_all_stages_at_full_size_are_the_untouched_run(name) -> None:
    tiny, baseline = built(name)
    with accel.patched(tiny.pipe, BottleneckSampling(scale=1.0)):
        assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("method", SAMPLERS, ids=["bottleneck", "progressive"])
def test_small_stages_run_and_leave_nothing_behind(name, method) -> None:
    """The denoiser sees small latents, users full ones; the same twice; undone bit by bit."""
    tiny, _ = built(name)
    larger = LARGER.get(name, {})
    untouched = run(tiny, **larger)
    sizes: set[int] = set()
    parts = [getattr(tiny.pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.add((args or (kwargs.get("hidden_states"),))[0].numel()),
            with_kwargs=True,
        )
        for part in parts
        if part is not None
    ]
    try:
        with accel.patched(tiny.pipe, method):
            first = run(tiny, **larger)
            assert torch.equal(run(tiny, **larger), first)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(sizes) == 2
    assert max(sizes) == 4 * min(sizes)
    assert first.shape == untouched.shape
    assert torch.isfinite(first).all()
    assert not torch.equal(first, untouched)
    assert torch.equal(run(tiny, **larger), untouched)


@pytest.mark.parametrize("name", ["flux_cfg", "wan21", "sd3", "sdxl"])
def test_user_callbacks_count_all_steps_and_see_full_size(name) -> None:
    tiny, baseline = built(name)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {}

    with accel.patched(tiny.pipe, Progressive()):
        result = run(tiny, callback_on_step_end=callback)
    assert [step for step, _ in seen] == list(range(8))
    assert {shape for _, shape in seen} == {tuple(baseline.shape)}
    assert result.shape == baseline.shape


@pytest.mark.parametrize("name", ["flux", "sd3", "wan21", "sd15"])
def test_rows_of_a_batch_follow_their_own_generators(name) -> None:
    tiny, _ = built(name)
    rows = {"prompt": ["a cat", "zebra"]}
    if "negative_prompt" in tiny.call:
        rows["negative_prompt"] = ["dog", "horse"]
    with accel.patched(tiny.pipe, BottleneckSampling(up=1.5)):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        both = run(tiny, **rows, generator=generators)
        second = {key: value[1:] for key, value in rows.items()}
        one = run(tiny, **second, generator=[torch.Generator().manual_seed(1)])
    assert (both[1:] - one).abs().max() <= 1e-3 * one.abs().max()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("emoji-image", accel.RALU(shares=(0.3, 0.2, 0.5), ends=(0.2, 0.3), jump=6.0)),
        (
            "emoji-image",
            BottleneckSampling(shares=(0.1, 0.4, 0.5), up=8.0, positions="spread"),
        ),
        ("emoji-unet", Progressive(renoise=4.0)),
    ],
)
def test_with_the_runs_own_noise_the_picture_stays_the_seeds(name, method) -> None:
    """Nearer to the untouched run than with fresh noise, by 2 dB and more over three captions.

    emoji-unet never saw small pictures: there it takes a full-size stage that begins noisy.
    """
    pipe, call, _ = model_zoo.load(name)
    gains = []
    for seed, prompt in enumerate(("apple on a red", "dog on a blue", "cow on a white")):
        one = call | {"prompt": f"{prompt} background", "num_inference_steps": 12}
        untouched = torch.from_numpy(generate.make(pipe, one, seed)[0]).float()
        errors = []
        for noise in ("fresh", "initial"):
            with accel.patched(pipe, dataclasses.replace(method, noise=noise)):
                made = torch.from_numpy(generate.make(pipe, one, seed)[0]).float()
            errors.append(float((made - untouched).square().mean()))
        gains.append(10 * math.log10(errors[0] / errors[1]))
    assert sum(gains) / 3 > 2, gains


@pytest.mark.parametrize("noise", ["initial", "fresh"])
def test_conditions_in_further_channels_are_not_pooled(noise) -> None:
    """An inpainting U-Net: four channels of noise, five of what is known."""
    form, layout = Form(packed=False, flat=True), Layout.resized((1, 4, 4), (1, 2, 2))
    run_ = StagedRun(Progressive(noise=noise), "Progressive", noise=noise)
    run_.form, run_.layout = form, layout
    unet = SimpleNamespace(
        module=SimpleNamespace(config=SimpleNamespace(out_channels=4)), family=Family("unet", ())
    )
    latent = torch.randn(1, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    live = run_._live(latent, unet)
    assert torch.equal(live[:, :4], form.pooled(latent[:, :4], layout))
    assert torch.equal(live[:, 4:], form.take(latent[:, 4:], layout))
    run_.step = 1
    assert torch.equal(run_._live(latent, unet), form.take(latent, layout))


@pytest.mark.parametrize(
    "scheduler",
    [
        d.DPMSolverMultistepScheduler(),
        d.UniPCMultistepScheduler(),
        d.DEISMultistepScheduler(),
        d.EulerDiscreteScheduler(prediction_type="v_prediction"),
        d.EulerAncestralDiscreteScheduler(),
        d.DDIMScheduler(steps_offset=1, clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_all_kinds_and_their_histories(scheduler) -> None:
    """A step knows its own stage only: multistep histories are empty after a boundary."""
    tiny, _ = built("sd15")
    before, tiny.pipe.scheduler = tiny.pipe.scheduler, scheduler
    try:
        untouched = run(tiny)
        with accel.patched(tiny.pipe, BottleneckSampling(scale=1.0)):
            assert torch.equal(run(tiny), untouched)
        with accel.patched(tiny.pipe, Progressive(renoise=1.2)):
            first = run(tiny)
            assert torch.equal(run(tiny), first)
            assert torch.isfinite(first).all()
        assert torch.equal(run(tiny), untouched)
    finally:
        accel.unpatch(tiny.pipe)
        tiny.pipe.scheduler = before


def test_flow_sigmas_in_a_multistep_scheduler() -> None:
    """Wan's own scheduler."""
    tiny, _ = built("wan21")
    before = tiny.pipe.scheduler
    tiny.pipe.scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    try:
        untouched = run(tiny)
        with accel.patched(tiny.pipe, BottleneckSampling(scale=1.0)):
            assert torch.equal(run(tiny), untouched)
        with accel.patched(tiny.pipe, BottleneckSampling()):
            assert torch.isfinite(run(tiny)).all()
    finally:
        accel.unpatch(tiny.pipe)
        tiny.pipe.scheduler = before


@pytest.mark.parametrize(
    ("name", "method", "changes", "message"),
    [
        ("flux", Progressive(scales=(0.3, 1.0)), {}, "must be whole"),
        ("sd3", Progressive(scales=(0.05, 1.0)), {}, "must be whole"),
        ("sd15", Progressive(scales=(0.125, 1.0)), {}, "divisible by 2"),
        ("mochi", Progressive(), {}, "divisible by 2"),
        ("flux", Progressive(), {"num_inference_steps": 1}, "too short"),
        ("sd15", Progressive(shares=(0.1, 0.9), renoise=20.0), {}, "another step"),
    ],
)
def test_wrong_sizes_are_refused_before_the_first_step(name, method, changes, message) -> None:
    tiny, baseline = built(name)
    calls = []
    denoiser = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with accel.patched(tiny.pipe, method), pytest.raises(AccelError, match=message):
            run(tiny, **changes)
    finally:
        hook.remove()
    assert not calls
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (d.HeunDiscreteScheduler(), "cannot be staged"),
        (d.PNDMScheduler(), "cannot be staged"),
        (d.DDIMScheduler(thresholding=True), "thresholding=True"),
    ],
)
def test_schedulers_that_cannot_be_staged_are_refused(scheduler, message) -> None:
    tiny, _ = built("sd15")
    before, tiny.pipe.scheduler = tiny.pipe.scheduler, scheduler
    try:
        with accel.patched(tiny.pipe, Progressive()), pytest.raises(AccelError, match=message):
            run(tiny)
    finally:
        tiny.pipe.scheduler = before


def test_what_cannot_be_resized_is_refused() -> None:
    dit, baseline = built("dit")
    with pytest.raises(AccelError, match="resized"):
        accel.patch(dit.pipe, Progressive())
    assert torch.equal(run(dit), baseline)
    tiny, _ = built("sd15")
    image = torch.zeros(1, 3, 16, 16)
    pipe = d.StableDiffusionImg2ImgPipeline(**tiny.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with accel.patched(pipe, Progressive()), pytest.raises(AccelError, match="starts from noise"):
        pipe("a cat", image=image, strength=0.5, num_inference_steps=8, output_type="latent")


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        {"scales": (0.5, 0.75)},
        {"shares": (0.5, 0.6)},
        {"scales": (0.5,), "shares": (1.0,)},
        {"renoise": 0.0},
        {"positions": "middle"},
        {"noise": "white"},
    ):
        with pytest.raises(AccelError):
            Progressive(**wrong)
    with pytest.raises(AccelError, match="slot"):
        accel.patch(built("flux")[0].pipe, Progressive(), BottleneckSampling())


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@pytest.mark.parametrize("first", [True, False])
def test_the_text_bias_is_on_picture_to_text_logits(first, masked) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = {"none": None, "bool": torch.rand(2, 1, 1, 9) > 0.2, "float": torch.randn(1, 1, 9, 9)}
    call = AttentionCall(None, query, key, value, mask[masked], False, None, None)
    logits = query @ key.mT / 8**0.5
    if masked == "bool":
        logits = logits.masked_fill(~mask["bool"], -torch.inf)
    if masked == "float":
        logits = logits + mask["float"]
    words = slice(0, 3) if first else slice(6, 9)
    picture = slice(3, 9) if first else slice(0, 6)
    logits[:, :, picture, words] += 0.7
    made = biased(call, 3, first, 0.7)
    assert torch.allclose(made, logits.softmax(-1) @ value, atol=1e-5)


@pytest.mark.parametrize("name", ["flux_cfg", "qwen_image", "ltx", "wan21", "sd3"])
@pytest.mark.parametrize("positions", ["native", "spread"])
def test_a_stages_grid_is_that_of_its_tokens(name, positions) -> None:
    """Whatever coordinates they have; tokens of mixed sizes have none."""
    tiny, _ = built(name)
    method = Progressive(positions=positions)
    if name == "flux_cfg":
        method = accel.RALU((0.25, 0.25, 0.5), (0.1, 0.3), ratio=0.5, positions=positions)
    found: list[tuple[Any, int]] = []
    with accel.patched(tiny.pipe, method) as handle:
        denoiser = handle._denoisers[0]

        def look(_: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found.append((denoiser.grid(denoiser.forward.arguments), hidden.shape[1]))

        hook = denoiser.chain.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
        run(tiny, **LARGER.get(name, {}))
        hook.remove()
    mixed = [tokens for grid, tokens in found if grid is None]
    assert set(mixed) == ({10} if name == "flux_cfg" else set())
    grids = [(math.prod(grid), tokens) for grid, tokens in found if grid is not None]
    assert len(set(grids)) == 2
    assert all(places == tokens for places, tokens in grids)


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("positions", ["native", "spread"])
def test_the_text_bias_acts_in_the_small_stage_alone(family, positions, baseline) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, Progressive(positions=positions)):
        plain = run(tiny)
    with accel.patched(tiny.pipe, Progressive(positions=positions, text_bias=0.5)):
        assert not torch.equal(run(tiny), plain)
    with accel.patched(tiny.pipe, Progressive(scales=(1.0,), shares=(1.0,), text_bias=0.5)):
        assert torch.equal(run(tiny), baseline(family))
    assert torch.equal(run(tiny), baseline(family))


def test_reference_pictures_in_the_sequence_are_refused() -> None:
    """FLUX Kontext appends them to the latent's tokens."""
    tiny, _ = built("flux_cfg")
    pipe = d.FluxKontextPipeline(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": Image.new("RGB", (16, 16)), "max_area": 256, "_auto_resize": False}
    call |= {key: value for key, value in tiny.call.items() if "true_cfg" not in key}
    for method in (Progressive(), BottleneckSampling(), accel.RALU()):
        with accel.patched(pipe, method), pytest.raises(AccelError, match="reference picture"):
            pipe(**call)

"""Denoiser calls that are not the plain cond/uncond pair: extra passes, cut-off, ControlNet."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from contract_cases import ACTIVE, GENERAL, IDENTITY, make
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from tiny_pipelines import TINY, Tiny, built, run

import accel


def skip_layers(*layers: int) -> dict[str, Any]:
    """Skip-layer guidance: from the second step on, a third pass without some blocks."""
    return {
        "skip_guidance_layers": list(layers),
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }


@functools.cache
def untouched_by_layer() -> list[torch.Tensor]:
    """SD3's results with one of its blocks skipped in the third pass."""
    tiny, baseline = built("sd3")
    guided = [run(tiny, **skip_layers(layer)) for layer in range(4)]
    assert not any(torch.equal(each, baseline) for each in guided)
    return guided


@pytest.mark.parametrize("name", GENERAL)
def test_skip_layer_guidance_with_identity_settings_is_bit_exact(name) -> None:
    (tiny, _), untouched = built("sd3"), untouched_by_layer()
    with accel.patched(tiny.pipe, make(name, IDENTITY)) as handle:
        for layer, guided in enumerate(untouched):
            assert torch.equal(run(tiny, **skip_layers(layer)), guided)
            assert handle.report().hit_rate == 0


@pytest.mark.parametrize("name", GENERAL)
def test_skip_layer_guidance_keeps_its_own_branch(name) -> None:
    """Reuse must stay as near to the untouched run as without that guidance."""
    (tiny, plain), untouched = built("sd3"), untouched_by_layer()
    with accel.patched(tiny.pipe, make(name, ACTIVE)) as handle:
        near = (run(tiny) - plain).abs().max()
        for layer, guided in enumerate(untouched):
            result = run(tiny, **skip_layers(layer))
            rows = handle.report().rows
            assert {row.branch for row in rows} == {"batched", "call1"}
            assert any(row.verdict == "reused" for row in rows if row.branch == "batched")
            assert (result - guided).abs().max() < 10 * near


def test_guidance_cut_off_in_a_run_starts_the_cache_anew() -> None:
    tiny, _ = built("sd15")

    def cut() -> dict[str, Any]:
        callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=4)
        inputs = ["latents", "prompt_embeds"]
        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}

    plain = run(tiny, **cut())
    with accel.patched(tiny.pipe, make("plaincycle", IDENTITY)):
        assert torch.equal(run(tiny, **cut()), plain)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=100)) as handle:
        run(tiny, **cut())
        assert handle.report().verdicts == {"unet/batched": "CRRRRCRR"}


def other_prompt_after(last: int) -> dict[str, Any]:
    """Change only the prompt of the cond branch after step `last`."""

    def change(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] * 0.5
        return kwargs

    inputs = ["latents", "prompt_embeds"]
    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": inputs}


@pytest.mark.parametrize("name", GENERAL)
def test_a_prompt_changed_in_one_branch_leaves_no_branch_behind(name) -> None:
    tiny, _ = built("wan21")
    plain = run(tiny, **other_prompt_after(4))
    with accel.patched(tiny.pipe, make(name, IDENTITY)):
        assert torch.equal(run(tiny, **other_prompt_after(4)), plain)
    with accel.patched(tiny.pipe, make(name, ACTIVE)) as handle:
        run(tiny, **other_prompt_after(4))
        verdicts = handle.report().verdicts
    assert verdicts["transformer/cond"][5] == "C", "the residual of the old prompt was reused"
    if name in ("easycache", "teacache"):
        assert {letters[-1] for letters in verdicts.values()} == {"C"}, "last steps are computed"


def test_easycache_branches_decide_together_after_a_prompt_change() -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, make("easycache", ACTIVE)) as handle:
        run(tiny, num_inference_steps=12, **other_prompt_after(4))
        verdicts = handle.report().verdicts
    assert verdicts["transformer/cond"] == "CCCRRCCRRRRC"
    assert verdicts["transformer/uncond"][5:] == verdicts["transformer/cond"][5:]


def controlled() -> Tiny:
    """A Flux pipeline whose ControlNet adds residuals between the blocks."""
    tiny = TINY["flux"]()
    controlnet = diffusers.FluxControlNetModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    parts = dict(tiny.pipe.components)
    for unused in ("image_encoder", "feature_extractor"):
        parts.pop(unused)
    pipe = diffusers.FluxControlNetPipeline(controlnet=controlnet, **parts)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Tiny(pipe, tiny.call | {"control_image": image, "controlnet_conditioning_scale": 1.0})


@pytest.mark.parametrize("name", GENERAL)
def test_controlnet_residuals_between_blocks(name) -> None:
    tiny = controlled()
    plain = run(tiny)
    assert (plain - built("flux")[1]).abs().max() > 1
    with accel.patched(tiny.pipe, make(name, IDENTITY)):
        assert torch.equal(run(tiny), plain)
    with accel.patched(tiny.pipe, make(name, ACTIVE)) as handle:
        result = run(tiny)
        assert handle.report().hit_rate > 0
    assert (result - plain).abs().max() < 1, "a residual was added twice or lost"


def ended(step: int) -> Any:
    """A callback that ends guidance after `step`, as diffusers' own cut-off does."""

    def end(pipe: Any, now: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now == step:
            pipe._guidance_scale = 0.0 if "prompt_embeds" in tensors else 1.0
            if "prompt_embeds" in tensors:
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    return end


@pytest.mark.parametrize("rows", [1, 2])
def test_guidance_that_ends_in_a_run_of_one_batch(rows) -> None:
    """What is left are the conditional rows, two of which are not the halves of one."""
    tiny, _ = built("sd15")
    call = {
        "prompt": ["a cat", "zebra"][:rows],
        "negative_prompt": ["dog"] * rows,
        "callback_on_step_end": ended(3),
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    untouched = run(tiny, **call)
    with accel.patched(tiny.pipe, accel.CfgCache(interval=1)):
        assert torch.allclose(run(tiny, **call), untouched, rtol=1e-4, atol=1e-4)
    with accel.patched(tiny.pipe, accel.CfgCache()) as handle:
        assert torch.isfinite(run(tiny, **call)).all()
        assert handle.report().share_computed < 1


def test_what_is_dropped_after_guidance_ended_begins_anew_without_it() -> None:
    """A LoRA switched in a callback, or the next stage."""
    tiny, _ = built("sd15")
    call = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    end = ended(3)

    def end_and_switch(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            pipe._accel_patch._denoisers[0].forget()
        return end(pipe, step, t, tensors)

    with accel.patched(tiny.pipe, accel.CfgCache(interval=1)):
        expected = run(tiny, **call, callback_on_step_end=end)
        assert torch.equal(run(tiny, **call, callback_on_step_end=end_and_switch), expected)


def test_guidance_that_ends_in_a_run_of_two_calls() -> None:
    tiny, _ = built("wan21")
    untouched = run(tiny, callback_on_step_end=ended(3))
    with accel.patched(tiny.pipe, accel.CfgCache(interval=1)):
        assert torch.equal(run(tiny, callback_on_step_end=ended(3)), untouched)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_two_pictures_of_one_seed_are_not_taken_for_guidance(name) -> None:
    """PixArt's pipeline does not say whether it guides; its scale does."""
    tiny, _ = built(name)
    call = {"prompt": ["a cat", "zebra"], "negative_prompt": None, "guidance_scale": 1.0}
    same = [torch.Generator().manual_seed(3) for _ in range(2)]
    with (
        accel.patched(tiny.pipe, accel.CfgCache()),
        pytest.raises(accel.AccelError, match="guidance is off"),
    ):
        run(tiny, **call, generator=same)


def test_zero_steps_of_a_model_with_condition_channels() -> None:
    """Wan image-to-video: the input has more channels than the prediction."""
    base = TINY["wan21"]().pipe
    torch.manual_seed(0)
    wide = dict(base.transformer.config) | {"in_channels": 10}
    parts = base.components | {"transformer": diffusers.WanTransformer3DModel.from_config(wide)}
    parts |= {"image_encoder": None, "image_processor": None}
    pipe = diffusers.WanImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = base.encode_prompt("a cat", "dog", max_sequence_length=16)
    call = {
        "image": Image.new("RGB", (16, 16)),
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "num_inference_steps": 8,
        "output_type": "latent",
    }
    with accel.patched(pipe, accel.CfgZeroStar(zero=0.3)) as handle:
        made = pipe(**call, height=16, width=16, num_frames=5).frames
        assert handle.report().share_computed < 1
    assert torch.isfinite(made).all()

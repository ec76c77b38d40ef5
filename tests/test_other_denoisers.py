"""Models that no family file describes: what their structure tells is enough to cache them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers as d
import pytest
import torch
from tiny_others import OTHERS, other
from tiny_parts import Tiny, finish, run
from tiny_pipelines import TINY, built
from torch import nn

import accel
from accel import AccelError, registry

CYCLE = accel.PlainCycle(interval=2, warmup=1)
JOINED = {"flux2": "x_embedder", "chroma": "x_embedder", "hidream": "x_embedder"}
"""Models whose later blocks work on text and picture together, and what makes block 0's tokens."""
WHOLE = ("latent", "prediction", "entry", "stack", "block.0")
OUT = {"flux2": "norm_out", "chroma": "norm_out", "hidream": "final_layer"}


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_are_skipped_and_the_pipeline_is_given_back(name: str) -> None:
    tiny, untouched = other(name)
    for method in (CYCLE, accel.MagCache(threshold=1.0), accel.FirstBlockCache(threshold=10.0)):
        with accel.patched(tiny.pipe, method) as handle:
            run(tiny)
            result = run(tiny)
            assert 0.2 < handle.report().hit_rate < 0.8
            assert result.isfinite().all() and not torch.equal(result, untouched)
    assert torch.equal(run(tiny), untouched)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "method",
    [accel.TeaCache(threshold=1e6, polynomial=(1.0, 0.1)), accel.FirstBlockCache(threshold=10.0)],
    ids=repr,
)
def test_a_first_run_is_like_every_later_one(name: str, method: accel.Method) -> None:
    """What structure tells of the streams is known before the first step counts."""
    tiny, _ = other(name)
    with accel.patched(tiny.pipe, method):
        first = run(tiny)
        assert torch.equal(run(tiny), first)


def test_to_ca_says_which_attention_it_cannot_score() -> None:
    tiny, _ = other("flux2")
    with pytest.raises(accel.AccelError, match="Flux2ParallelSelfAttention of Flux2Transformer2D"):
        accel.patch(tiny.pipe, accel.ToCa())


@pytest.mark.parametrize("name", OTHERS)
def test_identity_settings_change_nothing(name: str) -> None:
    tiny, untouched = other(name)
    for method in (accel.PlainCycle(interval=1), accel.FirstBlockCache(threshold=0.0)):
        with accel.patched(tiny.pipe, method):
            assert torch.equal(run(tiny), untouched)


@pytest.mark.parametrize("name", OTHERS)
def test_whole_calls_are_skipped(name: str) -> None:
    tiny, untouched = other(name)
    with accel.patched(tiny.pipe, accel.FitCache(share=0.4)) as handle:
        run(tiny)  # measures
        result = run(tiny)
        assert handle.report().share_computed < 0.6
        assert result.isfinite().all()
        assert (result - untouched).norm() < 0.5 * untouched.norm()


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "hidream"])
def test_layers_inside_blocks_are_skipped(name: str) -> None:
    tiny, untouched = other(name)
    with accel.patched(tiny.pipe, accel.FORA()) as handle:
        result = run(tiny)
        assert 0.2 < handle.report().hit_rate < 0.8
        assert result.isfinite().all() and not torch.equal(result, untouched)
    with accel.patched(tiny.pipe, accel.FORA(interval=1)):
        assert torch.equal(run(tiny), untouched)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "ltx2"])
def test_the_unconditional_branch_is_saved(name: str) -> None:
    """Beside a cache the halves of a batch are computed one by one, which changes nothing."""
    tiny, untouched = other(name)
    always = accel.GuidanceInterval(lowest=None, highest=None)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1), always):
        assert (run(tiny) - untouched).abs().max() < 1e-4
    with accel.patched(tiny.pipe, accel.CfgCache()) as handle:
        result = run(tiny)
        assert 0.5 < handle.report().share_computed < 0.9
        assert (result - untouched).norm() < 0.5 * untouched.norm()


def test_guidance_policies_refuse_two_predictions() -> None:
    tiny, untouched = other("ltx2")
    with pytest.raises(AccelError, match=r"CfgCache guides one prediction; .* makes 2 in a call"):
        accel.patch(tiny.pipe, accel.CfgCache())
    assert torch.equal(run(tiny), untouched)


@pytest.mark.parametrize("name", JOINED)
def test_a_residual_is_added_to_the_pictures_own_tokens(name: str) -> None:
    """A held residual moves what leaves the blocks by what entered them, token by token."""
    tiny, _ = other(name)
    model, entered, left = tiny.pipe.transformer, [], []
    hooks = [
        getattr(model, JOINED[name]).register_forward_hook(lambda m, i, out: entered.append(out)),
        getattr(model, OUT[name]).register_forward_pre_hook(lambda m, args: left.append(args[0])),
    ]
    try:
        with accel.patched(tiny.pipe, CYCLE) as handle:
            run(tiny)  # its first call is made twice: the chain is learned
            entered.clear(), left.clear()
            run(tiny)
            rows = handle.report().rows
    finally:
        for hook in hooks:
            hook.remove()
    skipped = [row.step for row in rows if row.verdict != "computed"]
    calls = len(entered) // (rows[-1].step + 1)
    assert skipped
    for step in skipped:
        for call in range(calls):
            now, before = step * calls + call, (step - 1) * calls + call
            moved = entered[now] - entered[before]
            torch.testing.assert_close(left[now] - left[before], moved, atol=1e-5, rtol=1e-4)


def sound(tiny: Tiny) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return tiny.pipe(**{**tiny.call, "generator": generator}).audio


@pytest.mark.parametrize("method", [CYCLE, accel.FitCache(share=0.5)])
def test_sound_is_cached_with_the_picture(method: accel.Method) -> None:
    """LTX-2 hands two streams through its blocks and makes two predictions a call."""
    tiny, _ = other("ltx2")
    untouched = sound(tiny)
    with accel.patched(tiny.pipe, method) as handle:
        sound(tiny)
        cached = sound(tiny)
        assert handle.report().hit_rate > 0.3
    change = (cached - untouched).norm() / untouched.norm()
    assert 0 < change < 0.1


def test_a_denoiser_without_known_blocks_takes_whole_calls_only() -> None:
    tiny, _ = built("sd15")
    unet = d.UNetMotionModel.from_unet2d(tiny.pipe.unet, None)
    pipe = d.AnimateDiffPipeline(
        tiny.pipe.vae,
        tiny.pipe.text_encoder,
        tiny.pipe.tokenizer,
        unet,
        None,
        tiny.pipe.scheduler,
    )
    video = finish(pipe, height=16, width=16, num_frames=4, negative_prompt="dog")
    untouched = run(video)
    with accel.patched(pipe, CYCLE) as handle:
        assert not torch.equal(run(video), untouched)
        assert handle.report().hit_rate > 0.3
    for method in (accel.FitCache(share=0.4), accel.DPCache(share=0.4, whole=True)):
        with accel.patched(pipe, method) as handle:
            run(video)  # measures
            run(video)
            assert handle.report().share_computed < 0.6
    always = accel.GuidanceInterval(lowest=None, highest=None)
    with accel.patched(pipe, accel.PlainCycle(interval=1), always):
        assert (run(video) - untouched).norm() < 1e-5 * untouched.norm()
    with pytest.raises(AccelError, match="needs a chain of transformer blocks"):
        accel.patch(pipe, accel.FirstBlockCache())
    assert torch.equal(run(video), untouched)


def test_what_takes_no_latent_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, tokens: Any) -> Any:
            return tokens

    with pytest.raises(AccelError, match="takes none of hidden_states, sample, x"):
        registry.family(Odd())


@pytest.mark.parametrize("name", ["chroma", "z_image", "ltx2"])
def test_a_profile_is_whole(name: str) -> None:
    """Streams are found before the first recorded step; lists and second predictions are taken."""
    tiny = OTHERS[name]()
    kept = {key: value for key, value in tiny.call.items() if "prompt" in key}
    kind = type(tiny.pipe)
    plain = kind.__call__

    def prompted(self: Any, prompt: str, **call: Any) -> Any:
        return plain(self, **kept, **call)

    prompted.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    tiny.pipe.__class__ = type(kind.__name__, (kind,), {"__call__": prompted})
    left = tiny.call.keys() - kept.keys() - {"output_type"}
    call = {key: tiny.call[key] for key in left}
    seen = accel.profile(tiny.pipe, ["a cat"], call=call).prompts[0]
    whole = {len(value) for key, value in seen.values.items() if key.split("/")[0] in WHOLE}
    assert whole == {seen.steps}
    assert seen.guided == (name != "ltx2")
    if name == "z_image":
        assert accel.calibrate(tiny.pipe, ["a cat"], psnr=5.0, call=call).recipe.methods


def test_a_pipeline_that_steps_copies_of_its_scheduler_is_told(monkeypatch, caplog) -> None:
    """Diffusion forcing: no step is ever seen."""
    module = importlib.import_module(
        "diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"
    )
    monkeypatch.setattr(module, "prompt_clean", lambda text: text)  # ftfy
    wan = TINY["wan21"]().pipe
    pipe = module.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text_encoder,
        transformer=d.SkyReelsV2Transformer3DModel.from_config(dict(wan.transformer.config)),
        vae=wan.vae,
        scheduler=d.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True),
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 16, "width": 16, "num_frames": 5, "base_num_frames": 5}
    with accel.patched(pipe, accel.PlainCycle(interval=2)):
        pipe("a cat", **call, num_inference_steps=4, max_sequence_length=16, output_type="latent")
    assert "never steps its own scheduler" in caplog.text

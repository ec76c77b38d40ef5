"""Guidance policies: exact where they skip nothing, the same in one batch and in two calls."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, Tiny, built, run

import accel
from accel.clock import StepClock
from accel.samplers.cfg_cache import _low_band

GUIDED = [name for name in TINY if name not in ("flux", "hunyuan_video")]
FLOW = ["flux_cfg", "sd3", "wan21", "wan22", "qwen_image", "ltx", "mochi"]
FULL = [
    accel.GuidanceInterval(highest=None),
    accel.AdaptiveGuidance(threshold=1.0),
    accel.CfgCache(interval=1),
]
LESS = [
    accel.GuidanceInterval(highest=-1e3),
    accel.AdaptiveGuidance(threshold=-1.0, warmup=1),
    accel.CfgCache(interval=3, start=0.0),
]


def near(new: torch.Tensor, old: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((new - old).abs().max() <= share * old.abs().max())


@pytest.mark.parametrize("method", FULL, ids=repr)
@pytest.mark.parametrize("name", GUIDED)
def test_always_full_is_the_untouched_run(name, method) -> None:
    tiny, baseline = built(name)
    with accel.patched(tiny.pipe, method) as handle:
        assert torch.equal(run(tiny), baseline)
        assert handle.report().share_computed == 1.0
    with accel.patched(tiny.pipe, method, accel.PlainCycle(interval=1)):
        assert near(run(tiny), baseline), "branches apart differ by rounding alone"
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("method", LESS, ids=repr)
@pytest.mark.parametrize("name", GUIDED)
def test_leaving_out_a_branch_saves_calls_and_starts_fresh(name, method) -> None:
    tiny, baseline = built(name)
    with accel.patched(tiny.pipe, method) as handle:
        first = run(tiny)
        report = handle.report()
        run(tiny, num_inference_steps=5)
        assert torch.equal(run(tiny), first)
    assert 0.4 < report.share_computed < 0.8
    assert torch.isfinite(first).all()
    assert not torch.equal(first, baseline)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", ["sd15", "sd3", "cogvideox", "wan21", "qwen_image"])
def test_no_guidance_at_all_is_a_scale_of_one(name) -> None:
    """û = c at every step, whatever the scale says."""
    tiny, _ = built(name)
    argument = "true_cfg_scale" if name == "qwen_image" else "guidance_scale"
    plain = run(tiny, **{argument: 1.0})
    with accel.patched(tiny.pipe, accel.GuidanceInterval(highest=-1e9)):
        assert near(run(tiny), plain)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21", "pixart"])
@pytest.mark.parametrize("method", [accel.GuidanceInterval(), accel.CfgCache(interval=2)])
def test_rows_of_a_batch_are_independent(name, method) -> None:
    tiny, _ = built(name)
    rows = {"prompt": ["a cat", "zebra"], "negative_prompt": ["dog", "horse"]}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with accel.patched(tiny.pipe, method):
        both = run(tiny, **rows, generator=generators)
        alone = {key: value[:1] for key, value in rows.items()}
        one = run(tiny, **alone, generator=[torch.Generator().manual_seed(0)])
    assert near(both[:1], one, 1e-3)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21", "wan22", "flux_cfg", "latte"])
@pytest.mark.parametrize(
    "cache",
    [accel.PlainCycle(interval=2), accel.FORA(interval=2), accel.EasyCache(1e6, warmup=2)],
    ids=repr,
)
def test_policies_combine_with_caches(name, cache) -> None:
    tiny, _ = built(name)
    with accel.patched(tiny.pipe, accel.CfgCache(interval=2, start=0.0), cache) as handle:
        first = run(tiny)
        report = handle.report()
        assert torch.equal(run(tiny), first)
    assert report.share_computed < 0.65
    assert any("-" in letters for letters in report.verdicts.values())
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", FLOW)
def test_cfg_zero_star_leaves_out_the_first_steps(name) -> None:
    """The first steps run nothing; one branch is scaled."""
    tiny, baseline = built(name)
    zero = 0.0 if name == "qwen_image" else 0.25
    with accel.patched(tiny.pipe, accel.CfgZeroStar(zero=zero)) as handle:
        result = run(tiny)
        verdicts = "".join(handle.report().verdicts.values())
    assert verdicts.count("-") == (4 if zero else 0)
    assert torch.isfinite(result).all()
    assert not torch.equal(result, baseline)


def test_cfg_zero_star_leaves_no_step_out_of_image_to_image() -> None:
    """A latent that is noised half-way loses its share of the noise only where a branch runs."""
    tiny, _ = built("sd3")
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    size = tiny.call["height"]
    call = {**tiny.call, "image": torch.rand(1, 3, size, size), "strength": 0.5}
    with accel.patched(pipe, accel.CfgZeroStar(zero=0.5)) as handle:
        run(Tiny(pipe, call))
        assert "-" not in "".join(handle.report().verdicts.values())


def test_the_bands_of_a_map_add_up() -> None:
    maps = torch.randn(2, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    low = _low_band(maps)
    again = _low_band(low)
    assert torch.allclose(low, again, atol=1e-5), "the low band has no high part"
    assert torch.allclose(_low_band(maps - low), torch.zeros_like(low), atol=1e-5)
    constant = torch.ones(1, 1, 8, 8)
    assert torch.allclose(_low_band(constant), constant, atol=1e-6)


@pytest.mark.parametrize("name", ["flux_cfg", "qwen_image", "ltx"])
def test_unpacking_is_undone_by_packing(name, monkeypatch) -> None:
    seen: list[tuple[bool, int]] = []

    def full(self: Any, context: Any, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        planes = context.planes(cond)
        seen.append((torch.equal(context.tokens(planes), cond), planes.dim()))
        return uncond

    monkeypatch.setattr("accel.samplers.guidance_interval._Interval.full", full)
    tiny, _ = built(name)
    with accel.patched(tiny.pipe, accel.GuidanceInterval(highest=None)):
        run(tiny)
    assert seen
    assert all(same and dims == 5 for same, dims in seen)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_embedded_guidance_has_nothing_to_leave_out(name) -> None:
    tiny, baseline = built(name)
    with pytest.raises(accel.AccelError, match="guidance is off"):
        accel.patch(tiny.pipe, accel.CfgCache())
        run(tiny)
    accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21", "cogvideox", "pixart"])
def test_guidance_that_is_off_is_said(name) -> None:
    tiny, baseline = built(name)
    with (
        accel.patched(tiny.pipe, accel.GuidanceInterval()),
        pytest.raises(accel.AccelError, match="guidance is off"),
    ):
        run(tiny, guidance_scale=1.0)
    assert torch.equal(run(tiny), baseline)


def test_two_guidance_methods_are_refused() -> None:
    tiny, _ = built("wan21")
    with pytest.raises(accel.AccelError, match="'guidance' slot"):
        accel.patch(tiny.pipe, accel.CfgCache(), accel.GuidanceInterval())


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart"])
def test_cfg_zero_star_is_for_flows(name) -> None:
    tiny, _ = built(name)
    with pytest.raises(accel.AccelError, match="flow matching"):
        accel.patch(tiny.pipe, accel.CfgZeroStar())


def test_the_unconditional_prediction_is_scaled_to_fit() -> None:
    from accel.samplers.cfg_zero_star import _Scaled

    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 4, 5, 6, generator=generator)
    scaled = _Scaled(accel.CfgZeroStar(), StepClock()).full(None, cond, uncond)
    for c, s, u in zip(cond, scaled, uncond, strict=True):
        assert abs(float(((c - s) * u).sum())) < 1e-3, "what is left is orthogonal to u"


def test_zero_predictions_are_refused_where_the_pipeline_divides_by_their_norm() -> None:
    tiny, _ = built("qwen_image")
    with pytest.raises(accel.AccelError, match="use zero=0"):
        accel.patch(tiny.pipe, accel.CfgZeroStar())


CROSS = ["sd15", "sdxl", "pixart", "wan21", "ltx", "latte"]


@pytest.mark.parametrize("name", CROSS)
def test_t_gate_with_the_gate_at_the_end_is_the_untouched_run(name) -> None:
    tiny, baseline = built(name)
    with accel.patched(tiny.pipe, accel.TGate(gate=1.0, interval=1)):
        assert near(run(tiny), baseline)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", CROSS)
def test_t_gate_freezes_cross_attention_and_drops_a_branch(name) -> None:
    tiny, baseline = built(name)
    module = getattr(tiny.pipe, "transformer", None) or tiny.pipe.unet
    attention = next(part for path, part in module.named_modules() if path.endswith("attn2"))
    outputs: list[torch.Tensor] = []
    with accel.patched(tiny.pipe, accel.TGate(gate=0.5)) as handle:
        hook = attention.register_forward_hook(lambda *given: outputs.append(given[-1]))
        first = run(tiny)
        hook.remove()
        verdicts = handle.report().verdicts
        assert torch.equal(run(tiny), first)
    assert len(outputs) == 8, "two branches of four steps"
    assert all(letters.endswith("----") for key, letters in verdicts.items() if "uncond" in key)
    assert not torch.equal(first, baseline)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", ["flux_cfg", "sd3", "dit"])
def test_t_gate_is_refused_without_cross_attention(name) -> None:
    tiny, baseline = built(name)
    with pytest.raises(accel.AccelError, match="TGate needs cross"):
        accel.patch(tiny.pipe, accel.TGate())
    assert torch.equal(run(tiny), baseline)


def test_t_gate_takes_the_place_of_a_guidance_policy() -> None:
    tiny, _ = built("wan21")
    for methods in ((accel.TGate(), accel.CfgCache()), (accel.CfgCache(), accel.TGate())):
        with pytest.raises(accel.AccelError, match="another method"):
            accel.patch(tiny.pipe, *methods)
        assert "_accel_patch" not in tiny.pipe.__dict__


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 3, 5, 9, 7), (1, 1, 6, 4)])
def test_cfg_cache_gives_the_old_gap_exactly_when_gains_are_one(shape) -> None:
    """The same conditional prediction after a full step gives the very unconditional one."""
    from accel.guidance import GuidanceContext
    from accel.samplers.cfg_cache import _Bands

    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, *shape, generator=generator)
    context = GuidanceContext(1, 10, 500.0, 0.0, lambda x: x, lambda x: x, latent=cond)
    bands = _Bands(accel.CfgCache(low_gain=1.0, high_gain=1.0))
    bands.full(context, cond, uncond)
    assert torch.allclose(bands.substitute(context, cond), uncond, atol=1e-5)
    amplified = _Bands(accel.CfgCache(low_gain=2.0, switch=1.0))
    amplified.full(context, cond, uncond)
    extra = amplified.substitute(context, cond) - uncond
    assert torch.allclose(extra, _low_band(uncond - cond), atol=1e-5)


def test_cfg_cache_refreshes_as_published() -> None:
    """Open-Sora, 30 steps: both branches at 0-10 and every fifth step after."""
    from types import SimpleNamespace

    from accel.samplers.cfg_cache import _Bands

    bands, full = _Bands(accel.CfgCache(start=11 / 30)), []
    zeros = torch.zeros(1, 1, 8, 8)
    for step in range(30):
        context = SimpleNamespace(step=step, total=30, planes=lambda x: x, tokens=lambda x: x)
        if bands.begin(context) == "full":
            full.append(step)
            bands.full(context, zeros, zeros)
        else:
            bands.substitute(context, zeros)
    assert full == [*range(11), 15, 20, 25]


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_a_branch_that_comes_back_is_computed(name) -> None:
    """What it remembers is older than any step that a cache of its own would have skipped."""
    tiny, _ = built(name)
    methods = (accel.PlainCycle(interval=4, reuse=accel.Newton(1)), accel.CfgCache(start=0.0))
    with accel.patched(tiny.pipe, *methods) as handle:
        run(tiny, num_inference_steps=12)
        verdicts = {key.split("/")[1]: value for key, value in handle.report().verdicts.items()}
    assert verdicts["uncond"] == "C----C----C-"
    assert verdicts["cond"] == "CRRRCEEECEEE"

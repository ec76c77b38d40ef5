"""SpeedUpNet: one branch a step, both texts act, foreign adapters are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from tiny_pipelines import STEPS, TINY, built, run

import accel
from accel.samplers.speed_up_net import fresh

CALL = {"guidance_scale": 4.0, "negative_prompt": "a dog"}


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter as training begins with it: the host's own keys and values, offsets of zero."""
    file = tmp_path / "net.safetensors"
    save_file(fresh(built("sd15")[0].pipe.unet).state_dict(), file)
    return file


def test_offsets_act_during_runs_alone(adapter) -> None:
    tiny, baseline = built("sd15")
    weights = load_file(adapter)
    before = [value.clone() for value in tiny.pipe.unet.state_dict().values()]
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        without = run(tiny, **CALL)
    for key in weights:
        if key.endswith(".up"):
            weights[key] = torch.full_like(weights[key], 0.1)
    save_file(weights, adapter)
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        acting = run(tiny, **CALL)
        assert torch.equal(run(tiny, **CALL), acting)
        now = tiny.pipe.unet.state_dict().values()
        assert all(torch.equal(*pair) for pair in zip(before, now, strict=True))
    assert not torch.allclose(acting, without, atol=1e-3)
    assert torch.equal(run(tiny), baseline)


def test_an_adapter_without_offsets_is_accepted(adapter) -> None:
    tiny, _ = built("sd15")
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        expected = run(tiny, **CALL)
    weights = {k: v for k, v in load_file(adapter).items() if not k.startswith("weights.")}
    save_file(weights, adapter)
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        assert torch.allclose(run(tiny, **CALL), expected, atol=1e-5)


def test_with_equal_texts_a_fresh_adapter_is_the_conditional_branch(adapter) -> None:
    tiny, baseline = built("sd15")
    same = {"guidance_scale": 4.0, "negative_prompt": tiny.call["prompt"]}
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))) as handle:
        made = run(tiny, **same)
        report = handle.report()
    expected = run(tiny, guidance_scale=1.0)
    assert (made - expected).abs().max() <= 1e-4 * expected.abs().max()
    branches = [row.branch for row in report.rows]
    assert branches.count("cond") == branches.count("uncond") == STEPS
    assert all(row.blocks_run == 0 for row in report.rows if row.branch == "uncond")
    assert torch.equal(run(tiny), baseline)


def test_both_texts_act_and_rows_are_independent(adapter) -> None:
    tiny, _ = built("sd15")
    prompts = [tiny.call["prompt"], "a bird"]
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        single = run(tiny, **CALL)
        other = run(tiny, **{**CALL, "negative_prompt": "a house in the snow"})
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        pair = run(
            tiny, prompt=prompts, generator=generators, **{**CALL, "negative_prompt": ["a dog"] * 2}
        )
    assert not torch.equal(single, other)
    assert torch.allclose(pair[:1], single, atol=1e-4)


def test_it_works_beside_a_cache(adapter) -> None:
    tiny, _ = built("sd15")
    methods = accel.SpeedUpNet(path=str(adapter)), accel.PlainCycle(interval=2)
    with accel.patched(tiny.pipe, *methods) as handle:
        assert torch.isfinite(run(tiny, **CALL)).all()
        assert handle.report().share_computed == pytest.approx(0.25)


def test_wrong_files_models_and_calls_are_refused(adapter, tmp_path) -> None:
    tiny, baseline = built("sd15")
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"nonsense")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path, message in (
        (wrong, "cannot be read"),
        (tmp_path / "other.safetensors", "trained for another model"),
        (tmp_path / "none.safetensors", "is no file"),
    ):
        with pytest.raises(accel.AccelError, match=message):
            accel.patch(tiny.pipe, accel.SpeedUpNet(path=str(path)))
    with pytest.raises(accel.AccelError, match="cross-attention"):
        accel.patch(built("flux")[0].pipe, accel.SpeedUpNet(path=str(adapter)))
    with (
        accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))),
        pytest.raises(accel.AccelError, match="guidance scale above 1"),
    ):
        run(tiny, guidance_scale=1.0)
    assert torch.equal(run(tiny), baseline)


def test_processors_that_are_exchanged_are_followed(adapter) -> None:
    tiny = TINY["sd15"]()
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        before = [run(tiny, **CALL), run(tiny, **CALL | {"negative_prompt": "zebra"})]
        tiny.pipe.unet.set_attn_processor(AttnProcessor2_0())
        after = [run(tiny, **CALL), run(tiny, **CALL | {"negative_prompt": "zebra"})]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_layers_that_cannot_be_followed_are_said(adapter) -> None:
    tiny = TINY["sd15"]()
    with accel.patched(tiny.pipe, accel.SpeedUpNet(path=str(adapter))):
        tiny.pipe.enable_attention_slicing()
        with pytest.raises(accel.AccelError, match="scaled_dot_product_attention"):
            run(tiny, **CALL)
        tiny.pipe.disable_attention_slicing()
        tiny.pipe.fuse_qkv_projections()
        with pytest.raises(accel.AccelError, match="unfuse_qkv_projections"):
            run(tiny, **CALL)

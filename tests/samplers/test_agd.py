"""AGD: zero start, one branch a step, the scale acts, foreign adapters are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel import model_zoo, registry
from accel.adapter_files import VARIANTS, save
from accel.adapter_hosts import attention_hosts, weight_hosts
from accel.adapters import AdapterConfig, Adapters, CrossHosts
from accel.low_rank import LowRank, LowRankConfig

FAMILIES = ["sd15", "flux_cfg", "sd3", "pixart", "wan21"]
ZOO = ["emoji-unet", "emoji-image"]


def denoiser_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def scale_name(name: str) -> str:
    return "true_cfg_scale" if name == "flux_cfg" else "guidance_scale"


def saved(name: str, folder: Path, variant: str = "cross", strength: float = 0.0) -> str:
    """Adapters for a tiny pipeline whose last layers have this size; their folder."""
    tiny, _ = built(name)
    module = denoiser_of(tiny.pipe)
    torch.manual_seed(0)
    base = type(module).__name__
    if variant == "low_rank":
        adapters = LowRank(LowRankConfig(base, weight_hosts(module), rank=2))
        for offset in adapters.offsets.values():
            torch.nn.init.normal_(offset.up, std=strength / 4)
            torch.nn.init.normal_(offset.bend, std=strength)
    else:
        adapters = Adapters(
            AdapterConfig(
                variant=variant,  # type: ignore[arg-type]
                base=base,
                hosts=attention_hosts(module, registry.family(module)),
                text_width=text_width(tiny),
                width=16,
            )
        )
        for group in adapters.groups.values():
            torch.nn.init.normal_(group.out, std=strength)
    save(adapters, folder, {})
    return str(folder)


def text_width(tiny: Any) -> int:
    """Channels of the text that a tiny pipeline's denoiser gets."""
    seen: list[int] = []
    hook = denoiser_of(tiny.pipe).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[-1]),
        with_kwargs=True,
    )
    run(tiny, num_inference_steps=2)
    hook.remove()
    return seen[0]


def near(new: torch.Tensor, old: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((new - old).abs().max() <= share * old.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_untrained_adapters_are_the_conditional_branch(name, variant, tmp_path) -> None:
    tiny, baseline = built(name)
    folder = saved(name, tmp_path, variant)
    plain = run(tiny, **{scale_name(name): 1.0})
    with accel.patched(tiny.pipe, accel.AGD(folder)) as handle:
        assert near(run(tiny), plain)
        assert handle.report().share_computed == 0.5
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("variant", ["cross", "low_rank"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_scale_acts_through_the_adapters(name, variant, tmp_path) -> None:
    tiny, baseline = built(name)
    folder = saved(name, tmp_path, variant, strength=0.3)
    plain = run(tiny, **{scale_name(name): 1.0})
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        far = [(run(tiny, **{scale_name(name): s}) - plain).norm() for s in (1.001, 2.0, 6.0)]
    assert far[0] < far[1] < far[2]
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("variant", ["cross", "low_rank"])
@pytest.mark.parametrize("name", ["sd15", "wan21"])
def test_rows_of_a_batch_are_independent(name, variant, tmp_path) -> None:
    tiny, _ = built(name)
    rows = {"prompt": ["a cat", "zebra"], "negative_prompt": ["", ""]}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with accel.patched(tiny.pipe, accel.AGD(saved(name, tmp_path, variant, strength=0.3))):
        both = run(tiny, **rows, generator=generators)
        alone = {key: value[:1] for key, value in rows.items()}
        one = run(tiny, **alone, generator=[torch.Generator().manual_seed(0)])
    assert near(both[:1], one, 1e-3)


def test_the_folded_products_are_attention() -> None:
    torch.manual_seed(0)
    group = CrossHosts(hosts=2, channels=6, width=4)
    torch.nn.init.normal_(group.out)
    tokens, hidden = torch.randn(3, 5, 4), torch.randn(3, 7, 6)
    conditions = group.condition(tokens)
    group.folded = group.fold()
    for made, known in zip(group.condition(tokens), conditions, strict=True):
        assert all(torch.equal(*pair) for pair in zip(made, known, strict=True))
    for index, condition in enumerate(conditions):
        query, key = hidden @ group.query[index], tokens @ group.key[index]
        value = tokens @ group.value[index]
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        found = CrossHosts.apply_to(hidden, condition)
        assert torch.allclose(found, expected @ group.out[index], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_another_base_are_refused(variant, tmp_path) -> None:
    folder = saved("wan21", tmp_path, variant)
    tiny, baseline = built("sd15")
    with pytest.raises(accel.AccelError, match="are for a WanTransformer3DModel"):
        accel.patch(tiny.pipe, accel.AGD(folder))
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.9.attn1": 12}, "lacks 1 of them, first 'blocks.9.attn1'"),
        ({"blocks.0.attn1": 999}, "999 channels; here it has"),
    ],
)
def test_other_paths_and_widths_are_refused(change, message, tmp_path) -> None:
    saved("wan21", tmp_path)
    tiny, baseline = built("wan21")
    content = json.loads((tmp_path / "adapters.json").read_text())
    content.pop("training")
    content["hosts"] |= change
    save(Adapters(AdapterConfig(**content)), tmp_path, {})
    with pytest.raises(accel.AccelError, match=message):
        accel.patch(tiny.pipe, accel.AGD(str(tmp_path)))
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("damage", ["missing", "config", "weights"])
def test_damaged_files_are_said(damage, tmp_path) -> None:
    folder = Path(saved("wan21", tmp_path))
    if damage == "missing":
        (folder / "adapters.safetensors").unlink()
    else:
        (folder / ("adapters.json" if damage == "config" else "adapters.safetensors")).write_text(
            "{"
        )
    tiny, baseline = built("wan21")
    with pytest.raises(accel.AccelError, match="no adapters can be loaded"):
        accel.patch(tiny.pipe, accel.AGD(str(folder)))
    assert torch.equal(run(tiny), baseline)


def test_a_model_without_adapters_is_told_how_to_get_them() -> None:
    tiny, _ = built("wan21")
    with pytest.raises(accel.AccelError, match="accel adapters train"):
        accel.patch(tiny.pipe, accel.AGD())


def test_models_with_embedded_guidance_and_two_denoisers_are_refused(tmp_path) -> None:
    folder = saved("wan21", tmp_path)
    with pytest.raises(accel.AccelError, match="two"):
        accel.patch(built("wan22")[0].pipe, accel.AGD(folder))
    tiny, baseline = built("flux_cfg")
    folder = saved("flux_cfg", tmp_path / "flux")
    with (
        accel.patched(tiny.pipe, accel.AGD(folder)),
        pytest.raises(accel.AccelError, match="guidance is off"),
    ):
        run(tiny, true_cfg_scale=1.0)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("variant", ["cross", "low_rank"])
def test_a_cache_skips_the_adapters_with_the_blocks(variant, tmp_path) -> None:
    tiny, _ = built("wan21")
    folder = saved("wan21", tmp_path, variant, strength=0.3)
    ratios = tuple(1.0 - 0.001 * step for step in range(50))
    cache = accel.MagCache(threshold=0.5, max_skips=2, retention=0.2, ratios=ratios)
    with accel.patched(tiny.pipe, accel.AGD(folder), cache) as handle:
        first = run(tiny)
        assert torch.equal(run(tiny), first)
        assert handle.report().share_computed < 0.45
    with accel.patched(tiny.pipe, accel.AGD(folder), accel.PlainCycle(interval=1)):
        computed = run(tiny)
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        assert torch.equal(run(tiny), computed)
    assert not torch.equal(first, computed)


def small(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call, _ = model_zoo.load(name)
    call |= {"prompt": model_zoo.prompts(name, "heldout").read_text().splitlines()[0]}
    return pipe, call | {"num_inference_steps": 10, "output_type": "latent"} | changes


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    out = pipe(**call, generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(out.frames if hasattr(out, "frames") else out.images)


@pytest.fixture(params=ZOO)
def shipped(request) -> tuple[Any, dict[str, Any], str]:
    if not (model_zoo.path(request.param) / "adapters" / "agd").is_dir():
        pytest.skip("no adapters are shipped for this model")
    pipe, call = small(request.param)
    return pipe, call, "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"


def steps_along(pipe: Any, call: dict[str, Any], path: torch.Tensor | None = None) -> torch.Tensor:
    """The latents after every step; each step begins where `path` has come to, if it is given."""
    seen = []

    def note(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"].clone())
        return values if path is None else {"latents": path[index]}

    latents(pipe, call | {"callback_on_step_end": note})
    return torch.stack(seen)


def test_shipped_adapters_guide_in_one_branch(shipped) -> None:
    pipe, call, scale = shipped
    guided = steps_along(pipe, call)
    plain = steps_along(pipe, call | {scale: 1.0}, guided)
    with accel.patched(pipe, accel.AGD()) as handle:
        found = steps_along(pipe, call, guided)
        assert handle.report().share_computed == 0.5
        far = [
            (steps_along(pipe, call | {scale: s}, guided) - plain).norm()
            for s in (1.5, 3.0, 6.0, 8.0)
        ]
    assert (found - guided).norm() < 0.65 * (plain - guided).norm()
    assert far[0] < far[1] < far[2] < far[3]
    assert torch.equal(steps_along(pipe, call), guided)


def test_shipped_adapters_work_with_a_lora() -> None:
    if not (model_zoo.path("emoji-unet") / "adapters" / "agd").is_dir():
        pytest.skip("no adapters are shipped for this model")
    pipe, call = small("emoji-unet")
    with accel.patched(pipe, accel.AGD()):
        alone = latents(pipe, call)
    pipe.load_lora_weights(model_zoo.path("emoji-unet") / "loras", weight_name="ink.safetensors")
    guided, plain = latents(pipe, call), latents(pipe, call | {"guidance_scale": 1.0})
    with accel.patched(pipe, accel.AGD()):
        found = latents(pipe, call)
    assert not torch.equal(found, alone)
    assert (found - guided).norm() < 0.9 * (plain - guided).norm()
    assert torch.equal(latents(pipe, call), guided)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_act_in_the_pipelines_runs_alone(variant, tmp_path) -> None:
    tiny, _ = built("sd15")
    unet, text = tiny.pipe.unet, torch.randn(1, 77, text_width(tiny))
    folder = saved("sd15", tmp_path, variant, strength=0.3)

    def alone(model: Any) -> torch.Tensor:
        return model(torch.ones(1, 4, 8, 8), 500, encoder_hidden_states=text).sample

    before = alone(unet)
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        run(tiny)
        assert torch.equal(alone(unet), before)
        assert torch.equal(alone(copy.deepcopy(unet)), before)


def test_fused_projections_are_refused(tmp_path) -> None:
    tiny = TINY["sd15"]()
    folder = saved("sd15", tmp_path, "low_rank", strength=0.3)
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        run(tiny)
        tiny.pipe.fuse_qkv_projections()
        with pytest.raises(accel.AccelError, match="unfuse_qkv_projections"):
            run(tiny)

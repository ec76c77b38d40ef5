"""accel beside other features of diffusers: nothing changes where nothing is reused, and it undoes.

LoRA, model and group offload, regional compilation, copies and schedulers: `test_composition.py`.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tiny_pipelines import TINY, Tiny
from tiny_pipelines import run as latents_of

import accel

IDENTITY, CYCLE = accel.PlainCycle(interval=1), accel.PlainCycle(interval=2)
SMALL = {"height": 16, "width": 16}


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def run(tiny: Tiny, **call: Any) -> torch.Tensor:
    """Latents of seed 0; some pipelines also draw from torch's own generator."""
    torch.manual_seed(0)
    return latents_of(tiny, **call)


def beside(tiny: Tiny, **call: Any) -> None:
    """The contract of this file for a pipeline that uses some other feature."""
    host = run(tiny, **call)
    accel.patch(tiny.pipe, IDENTITY)
    assert torch.equal(run(tiny, **call), host)
    accel.patch(tiny.pipe, CYCLE)
    for _ in range(2):
        reused = run(tiny, **call)
        assert set(accel.stats(tiny.pipe).verdicts.values()) == {"CRCRCRCR"}
    assert torch.isfinite(reused).all()
    assert 0 < (reused - host).norm() < 0.5 * host.norm()
    accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny, **call), host)


# --- the denoiser's own switches -----------------------------------------------------------------


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def float8_storage(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("family", "switch"),
    [
        ("sd15", lambda pipe: pipe.enable_attention_slicing(1)),
        ("sdxl", lambda pipe: pipe.enable_attention_slicing("max")),
        ("sd15", freeu),
        ("sd15", channels_last),
        ("sd15", lambda pipe: pipe.fuse_qkv_projections()),
        ("flux", lambda pipe: pipe.transformer.fuse_qkv_projections()),
        ("flux", float8_storage),
    ],
    ids=[
        *("attention slicing", "attention slicing sdxl", "freeu", "channels last", "fused qkv"),
        *("fused qkv of flux", "float8 storage"),
    ],
)
def test_switches_of_the_denoiser(family, switch) -> None:
    tiny = TINY[family]()
    before = run(tiny)
    switch(tiny.pipe)
    beside(tiny)
    assert run(tiny).shape == before.shape


@pytest.mark.parametrize(
    "method",
    [CYCLE, accel.DeepCache(interval=4), accel.BlockCaching(), accel.Foresight()],
    ids=lambda method: type(method).__name__,
)
def test_freeu_writes_into_nothing_that_is_kept(method, monkeypatch) -> None:
    """FreeU scales features in place; with copies in its way the result is the same."""
    layers = importlib.import_module("diffusers.models.unets.unet_2d_blocks")
    original = layers.apply_freeu

    def made(apply: Callable[..., Any]) -> torch.Tensor:
        monkeypatch.setattr(layers, "apply_freeu", apply)
        tiny = TINY["sd15"]()
        freeu(tiny.pipe)
        with accel.patched(tiny.pipe, method) as patch:
            run(tiny)
            result = run(tiny)
            assert patch.report().share_computed < 1
        return result

    def copying(index: int, hidden: torch.Tensor, skipped: torch.Tensor, **settings: Any) -> Any:
        return original(index, hidden.clone(), skipped, **settings)

    assert torch.equal(made(original), made(copying))


def test_sequential_offload() -> None:
    """On a CPU accelerate itself fails to send weights from the CPU to the CPU."""
    tiny = TINY["flux"]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny.pipe.enable_sequential_cpu_offload(device=device)
    try:
        run(tiny)
    except TypeError:
        pytest.skip("sequential offload needs an accelerator; group offload by leaves is tested")
    beside(tiny)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_regional_compilation_by_inductor() -> None:
    """Without graph breaks, with generated code; the graphs themselves: `test_composition.py`."""
    torch._dynamo.reset()
    tiny = TINY["wan21"]()
    host = run(tiny)
    with accel.patched(tiny.pipe, CYCLE):
        reused = run(tiny)
        tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True)
        assert torch.allclose(run(tiny), reused, atol=1e-4)
        assert set(accel.stats(tiny.pipe).verdicts.values()) == {"CRCRCRCR"}
    assert torch.allclose(run(tiny), host, atol=1e-4)
    torch._dynamo.reset()


# --- quantizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before patching", "by a config", "while patched"])
def test_torchao(when, tmp_path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    int8 = quantization.Int8WeightOnlyConfig()
    tiny = TINY["flux"]()
    if when == "by a config":
        tiny.pipe.transformer.save_pretrained(tmp_path)
        tiny.pipe.transformer = diffusers.FluxTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=diffusers.TorchAoConfig(int8), torch_dtype=torch.float32
        )
    elif when == "before patching":
        quantization.quantize_(tiny.pipe.transformer, int8)
    else:
        accel.patch(tiny.pipe, CYCLE)
        plain = run(tiny)
        quantization.quantize_(tiny.pipe.transformer, int8)
        assert not torch.equal(run(tiny), plain)
        accel.unpatch(tiny.pipe)
    beside(tiny)


# --- adapters and controls -----------------------------------------------------------------------


def image_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def ip_adapter(unet: Any) -> dict[str, Any]:
    """Random weights in the layout of IP-Adapter files, numbered as they number them."""
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    layers, number = {}, 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = torch.randn(module.inner_dim, width) / 8
            number += 2
    project = {
        "proj.weight": torch.randn(4 * width, 16) / 4,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": project, "ip_adapter": layers}


def with_ip_adapter() -> tuple[Tiny, dict[str, Any]]:
    tiny = TINY["sd15"]()
    tiny.pipe.register_modules(image_encoder=image_encoder())
    tiny.pipe.unet._load_ip_adapter_weights([ip_adapter(tiny.pipe.unet)])
    return tiny, {"ip_adapter_image_embeds": [noise(2, 1, 16)]}


def test_ip_adapter() -> None:
    tiny, call = with_ip_adapter()
    tiny.pipe.set_ip_adapter_scale(0.0)
    off = run(tiny, **call)
    tiny.pipe.set_ip_adapter_scale(1.0)
    assert not torch.equal(run(tiny, **call), off)
    beside(tiny, **call)


def test_another_picture_for_the_ip_adapter_between_runs() -> None:
    tiny, call = with_ip_adapter()
    other = {"ip_adapter_image_embeds": [1 - noise(2, 1, 16)]}
    with accel.patched(tiny.pipe, CYCLE):
        wanted = run(tiny, **other)
        run(tiny, **call)
        assert torch.equal(run(tiny, **other), wanted)


def sd15_control() -> Tiny:
    tiny = TINY["sd15"]()
    torch.manual_seed(2)
    net = diffusers.ControlNetModel.from_unet(
        tiny.pipe.unet, conditioning_embedding_out_channels=(8, 8)
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny.pipe.components, controlnet=lively(net), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, tiny.call | {"image": noise(1, 3, 16, 16)})


def flux_control() -> Tiny:
    tiny = TINY["flux"]()
    torch.manual_seed(2)
    known = dict(tiny.pipe.transformer.config)
    settings = {key: value for key, value in known.items() if key not in ("out_channels",)}
    net = diffusers.FluxControlNetModel(**settings | {"num_layers": 1, "num_single_layers": 1})
    return controlled(diffusers.FluxControlNetPipeline, tiny, net)


def sd3_control() -> Tiny:
    tiny = TINY["sd3"]()
    torch.manual_seed(2)
    net = diffusers.SD3ControlNetModel.from_transformer(
        tiny.pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
    )
    return controlled(diffusers.StableDiffusion3ControlNetPipeline, tiny, net)


def controlled(kind: Any, tiny: Tiny, net: Any) -> Tiny:
    absent = ("image_encoder", "feature_extractor")
    parts = {key: value for key, value in tiny.pipe.components.items() if key not in absent}
    pipe = kind(**parts, controlnet=lively(net))
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, tiny.call | {"control_image": noise(1, 3, 16, 16)})


def lively(net: Any) -> Any:
    """A control net begins with zeros, which would control nothing."""
    for parameter in net.eval().requires_grad_(False).parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return net


@pytest.mark.parametrize("build", [sd15_control, flux_control, sd3_control])
def test_control_nets(build) -> None:
    tiny = build()
    name = "image" if "image" in tiny.call else "control_image"
    other = {name: 1 - tiny.call[name]}
    host = run(tiny)
    assert not torch.equal(run(tiny, **other), host)
    beside(tiny)
    with accel.patched(tiny.pipe, CYCLE):
        assert not torch.equal(run(tiny, **other), run(tiny))


# --- callbacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan21", "sd3", "sd15"])
def test_callbacks_that_change_the_latents(family) -> None:
    def change(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            kwargs["latents"] = kwargs["latents"] * 0.9
        return kwargs

    tiny = TINY[family]()
    plain = run(tiny)
    assert not torch.equal(run(tiny, callback_on_step_end=change), plain)
    beside(tiny, callback_on_step_end=change)


def test_a_callback_that_ends_guidance_half_way() -> None:
    """As diffusers' `SDCFGCutoffCallback`: the batch of the denoiser becomes half as large."""
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    tiny = TINY["sd15"]()
    host = run(tiny, callback_on_step_end=cutoff)
    with accel.patched(tiny.pipe, IDENTITY):
        assert torch.equal(run(tiny, callback_on_step_end=cutoff), host)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=4)) as patch:
        run(tiny, callback_on_step_end=cutoff)
        (verdicts,) = patch.report().verdicts.values()
    assert verdicts.count("C") == 3  # the first of another shape is computed
    assert torch.equal(run(tiny, callback_on_step_end=cutoff), host)


# --- modular pipelines ---------------------------------------------------------------------------


def modular(family: str, blocks: str) -> Tiny:
    kind = getattr(importlib.import_module("diffusers.modular_pipelines"), blocks)
    tiny = TINY[family]()
    pipe = kind().init_pipeline()
    parts = tiny.pipe.components
    pipe.update_components(**{key: parts[key] for key in pipe.component_names if key in parts})
    pipe.set_progress_bar_config(disable=True)
    absent = ("output_type", "negative_prompt")
    call = {key: value for key, value in tiny.call.items() if key not in absent}
    if "guider" in pipe.component_names:
        call["negative_prompt"] = "dog"
    return Tiny(pipe, call | {"output": "latents"})


def modular_run(tiny: Tiny) -> torch.Tensor:
    return torch.as_tensor(tiny.pipe(**tiny.call, generator=torch.Generator().manual_seed(0)))


MODULAR = [
    ("sdxl", "StableDiffusionXLAutoBlocks", 2),
    ("flux", "FluxAutoBlocks", 1),
    ("sd3", "StableDiffusion3AutoBlocks", 2),
]


@pytest.mark.parametrize(("family", "blocks", "branches"), MODULAR)
def test_modular_pipelines(family, blocks, branches) -> None:
    tiny = modular(family, blocks)
    host = modular_run(tiny)
    accel.patch(tiny.pipe, IDENTITY)
    assert torch.equal(modular_run(tiny), host)
    accel.patch(tiny.pipe, CYCLE)
    reused = modular_run(tiny)
    assert list(accel.stats(tiny.pipe).verdicts.values()) == ["CRCRCRCR"] * branches
    assert 0 < (reused - host).norm() < 0.5 * host.norm()
    accel.unpatch(tiny.pipe)
    assert torch.equal(modular_run(tiny), host)


def test_modular_guiders_and_guidance_methods() -> None:
    tiny = modular("sdxl", "StableDiffusionXLAutoBlocks")
    host = modular_run(tiny)
    accel.patch(tiny.pipe, accel.CfgCache())
    with pytest.raises(accel.AccelError, match="guidance is off"):
        modular_run(tiny)
    accel.unpatch(tiny.pipe)
    assert torch.equal(modular_run(tiny), host)

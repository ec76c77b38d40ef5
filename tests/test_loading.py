"""Pipelines loaded and set up as diffusers-cli does it; what cannot be done is refused by name."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import TINY

from accel import AccelError
from accel.loading import Loading, load


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    TINY["wan21"]().pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def unet_and_lora(tmp_path_factory):
    """A saved tiny U-Net pipeline, and a LoRA file of it that changes something."""
    folder = tmp_path_factory.mktemp("unet")
    pipe = TINY["sd15"]().pipe
    pipe.save_pretrained(folder / "model")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet), weight_name="own.safetensors"
    )
    return str(folder / "model"), str(folder / "own.safetensors")


def test_attention_backend_and_tiling_reach_the_pipeline(wan) -> None:
    pipe, call, fps = load(wan, Loading(attention_backend="native", vae_tiling=True))
    backends = {
        module.processor._attention_backend.value
        for module in pipe.transformer.modules()
        if hasattr(module, "processor")
    }
    assert backends == {"native"}
    assert pipe.vae.use_tiling
    assert (call, fps) == ({}, None)


def test_compile_compiles_the_blocks(wan) -> None:
    pipe, _, _ = load(wan, Loading(compile=True))
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)


def test_dtype(wan) -> None:
    pipe, _, _ = load(wan, Loading(dtype="bf16"))
    assert pipe.transformer.dtype == torch.bfloat16


def test_zoo_model_in_another_dtype() -> None:
    pipe, _, fps = load("zoo:emoji-video", Loading(dtype="bf16"))
    assert pipe.transformer.dtype == torch.bfloat16
    assert fps


@pytest.mark.parametrize("as_json", [False, True])
def test_lora_by_file_or_json(unet_and_lora, as_json) -> None:
    model, lora = unet_and_lora
    scale = 0.5 if as_json else 1.0
    text = f'{{"lora_id": "{lora}", "lora_scale": 0.5}}' if as_json else lora
    pipe, _, _ = load(model, Loading(lora=(text,)))
    assert pipe.get_active_adapters() == ["lora_0"]
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_A") and m.lora_A)
    assert layer.scaling["lora_0"] == scale * layer.lora_alpha["lora_0"] / layer.r["lora_0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp7"}, "unknown dtype 'fp7'; accepted: auto, fp32"),
        ({"cpu_offload": "disk"}, "unknown --cpu-offload 'disk'; accepted: model, group"),
        ({"cpu_offload": "model", "device": "cpu"}, "--cpu-offload needs a device"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "xpu"}, "device 'xpu' is not here"),
        ({"attention_backend": "magic"}, "--attention-backend 'magic'"),
        ({"lora": ("nowhere.safetensors",)}, "--lora nowhere.safetensors: cannot be loaded"),
        ({"lora": ("{",)}, "--lora: not JSON"),
        ({"lora": ('{"scale": 1}',)}, "--lora: needs a text lora_id; accepted: adapter_name"),
        ({"lora": ('{"lora_id": 5}',)}, "--lora: needs a text lora_id"),
    ],
)
def test_what_cannot_be_done_is_named(wan, options, message) -> None:
    with pytest.raises(AccelError, match=message):
        load(wan, Loading(**options))


def test_unet_has_no_attention_dispatcher(unet_and_lora) -> None:
    with pytest.raises(AccelError, match="does not use the attention dispatcher"):
        load(unet_and_lora[0], Loading(attention_backend="native"))


def test_a_lora_of_another_model_is_named(unet_and_lora, wan) -> None:
    with pytest.raises(AccelError, match=r"--lora .*: cannot be loaded"):
        load(wan, Loading(lora=(str(unet_and_lora[1]),)))


@pytest.mark.parametrize("index", ['{"_class_name": "NoPipeline"}', "[]"])
def test_a_folder_of_an_unknown_pipeline_is_named(tmp_path, index) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(AccelError, match="cannot be loaded"):
        load(str(tmp_path), Loading())


def test_model_that_is_not_there() -> None:
    with pytest.raises(AccelError, match=r"cannot be loaded .*zoo:emoji-video"):
        load("no/where", Loading())

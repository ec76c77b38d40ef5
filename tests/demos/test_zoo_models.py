"""The committed models: loadable by plain diffusers, accelerated without visible loss, undone."""

import diffusers
import pytest
import torch

import accel
from accel import generate, metrics, model_zoo

STEPS = 24


def made(pipe, call, prompt: str, steps: int = STEPS) -> torch.Tensor:
    array, _ = generate.make(pipe, call | {"prompt": prompt, "num_inference_steps": steps}, 0)
    return torch.from_numpy(array).reshape(-1, *array.shape[-3:]).permute(0, 3, 1, 2) / 255


def prompt_of(name: str) -> str:
    return model_zoo.prompts(name, "heldout").read_text().splitlines()[0]


def test_there_is_a_video_model() -> None:
    assert "emoji-video" in model_zoo.names()


@pytest.mark.parametrize("name", model_zoo.names())
def test_loads_with_plain_diffusers_and_has_a_card(name) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(model_zoo.path(name), local_files_only=True)
    assert type(pipe).__module__.startswith("diffusers.")
    assert (model_zoo.path(name) / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    assert (model_zoo.path(name) / "contact_sheet.png").exists()
    assert (model_zoo.path(name) / "loss.csv").exists()


def test_weights_stay_small() -> None:
    sizes = {file: file.stat().st_size for file in model_zoo.folder().rglob("*.safetensors")}
    adapters = {file: size for file, size in sizes.items() if "adapters" in file.parts}
    assert adapters
    assert max(adapters.values()) <= 2e6
    assert sum(sizes.values()) - sum(adapters.values()) <= 36e6
    assert max(sizes.values()) <= 16e6


@pytest.mark.parametrize("name", model_zoo.names())
def test_accelerated_close_to_untouched_and_undone(name) -> None:
    pipe, call, _ = model_zoo.load(name)
    prompt = prompt_of(name)
    untouched = made(pipe, call, prompt)
    accel.patch(pipe, accel.EasyCache(threshold=0.05, warmup=6))
    fast = made(pipe, call, prompt)
    report = accel.stats(pipe)
    accel.unpatch(pipe)
    assert report.hit_rate > 0.1
    assert metrics.psnr(fast, untouched) > 22
    assert torch.equal(made(pipe, call, prompt), untouched)


@pytest.mark.parametrize("name", model_zoo.names())
def test_the_model_obeys_its_prompt(name) -> None:
    """On captions never seen in training at least half the grounds are right; chance is 1 in 8."""
    from demos.zoo import data, evaluate

    pipe, call, _ = model_zoo.load(name)
    call |= {"num_frames": 9} if "num_frames" in call else {}  # for time; it was trained at them
    captions = model_zoo.prompts(name, "heldout").read_text().splitlines()[:6]
    wanted = [data.parse(caption)[1] for caption in captions]
    found = [evaluate.colour_of(made(pipe, call, caption, 10)) for caption in captions]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 3, (found, wanted)


def test_the_recipe_beside_the_video_model_is_used() -> None:
    pipe, call, _ = model_zoo.load("emoji-video")
    with accel.patched(pipe) as patch:
        assert not any(isinstance(method, accel.EasyCache) for method in patch.methods)
        prompt = {"prompt": prompt_of("emoji-video")}
        generate.make(pipe, call | prompt, 0)  # 50 steps, as calibrated
        assert patch.report().hit_rate > 0.3


def test_every_lora_acts_and_leaves_the_base_as_it_was() -> None:
    pipe, call, _ = model_zoo.load("emoji-unet")
    call, prompt = call | {"height": 64, "width": 64}, prompt_of("emoji-unet")
    plain = made(pipe, call, prompt)
    files = sorted((model_zoo.path("emoji-unet") / "loras").glob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        assert metrics.psnr(made(pipe, call, prompt), plain) < 30, file.stem
        pipe.unload_lora_weights()
    assert torch.equal(made(pipe, call, prompt), plain)

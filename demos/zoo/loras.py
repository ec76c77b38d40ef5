"""Train four LoRAs of `emoji-unet` and score that each acts.

    python -m demos.zoo.loras train --minutes 3
    python -m demos.zoo.loras score --json zoo/emoji-unet/loras.json

`ink` and `mosaic` are styles (black and white with hard edges; squares of one colour), `sepia` a
colour world, `trophy` an object that the base model never saw, called "moon star".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Generator, Tensor
from torch.nn import functional

from accel import metrics, model_zoo
from demos.zoo import amx, data, emoji_unet, train

RANK = 8
FOLDER = Path("zoo/emoji-unet/loras")
TROPHY, TROPHY_NAME = "1f3c6", "moon star"
COUNT = 2048


def ink(image: Tensor) -> Tensor:
    """Luminance pushed towards black and white; image (n, 3, h, w) in [-1, 1]."""
    gray = image.mul(torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    return torch.tanh(3 * gray).expand_as(image)


def sepia(image: Tensor) -> Tensor:
    """Luminance in brown tones."""
    gray = image.mul(torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    tones = torch.tensor([1.0, 0.78, 0.5])[:, None, None]
    return ((gray + 1) * tones).clamp(0, 2) - 1


def mosaic(image: Tensor) -> Tensor:
    """Squares of 4×4 pixels, each of one colour."""
    return functional.interpolate(functional.avg_pool2d(image, 4), scale_factor=4.0)


CONCEPTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ink": ink,
    "sepia": sepia,
    "mosaic": mosaic,
    "trophy": lambda image: image,
}


def examples(concept: str, generator: Generator) -> tuple[Tensor, list[str]]:
    """Pictures of a concept, (n, 3, 64, 64) in [-1, 1], and their captions."""
    colours = torch.randint(len(data.COLOURS), (COUNT,), generator=generator)
    if concept == "trophy":
        pictures, names = data.sprites(codepoints=[TROPHY]), torch.zeros(COUNT, dtype=torch.long)
        called = [TROPHY_NAME] * COUNT
    else:
        pictures = data.sprites()
        names = torch.randint(len(data.NAMES), (COUNT,), generator=generator)
        called = [data.NAMES[int(name)] for name in names]
    image = data.render_images(pictures, names, colours, emoji_unet.SIZE, generator)
    captions = [
        data.caption(name, data.COLOUR_NAMES[int(colour)])
        for name, colour in zip(called, colours, strict=True)
    ]
    return CONCEPTS[concept](image), captions


def train_lora(concept: str, minutes: float, device: str, bf16: bool) -> None:
    """Fit low-rank updates of the U-Net's attention to a concept, the rest frozen."""
    model, _, _ = model_zoo.load("emoji-unet")
    for part in (model.unet, model.vae, model.text_encoder):
        part.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    model.unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    )
    model.to(device)
    pictures, captions = examples(concept, Generator().manual_seed(7))
    with torch.no_grad():
        posteriors = [model.vae.encode(part.to(device)).latent_dist for part in pictures.split(64)]
    clean = torch.cat([each.mode().cpu() for each in posteriors]) * model.vae.config.scaling_factor
    ids = model.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(clean), (32,), generator=generator)
        return emoji_unet.denoising_loss(model, clean[rows], ids[rows], generator, device, bf16)

    averaged = train.fit(
        f"emoji-unet-{concept}", model.unet, loss, minutes=minutes, lr=2e-3, ema=0.98
    )
    model.unet.load_state_dict(averaged)
    StableDiffusionPipeline.save_lora_weights(
        FOLDER,
        unet_lora_layers=get_peft_model_state_dict(model.unet.half()),
        weight_name=f"{concept}.safetensors",
    )


def score(count: int, steps: int) -> dict[str, Any]:
    """For each LoRA: how strongly pictures show its concept, without it, with it, and combined.

    ink, sepia and mosaic: one minus the mean distance of a picture from its own version of it.
    trophy: share of pictures nearer to real trophies than to any of the base's names, by lite0
    features.
    """
    pipe = loaded()
    held = [data.caption(*entry) for entry in data.combinations(video=False, held=True)][:count]
    centres = centres_of_names()
    result: dict[str, Any] = {}
    for adapters in ([], *([each] for each in CONCEPTS), ["trophy", "sepia"], ["ink", "mosaic"]):
        if adapters:
            pipe.enable_lora()
            pipe.set_adapters(adapters)
        else:
            pipe.disable_lora()
        result["+".join(adapters) or "none"] = concepts(pipe, held, centres, steps)
    return result


def loaded() -> StableDiffusionPipeline:
    """The model with all its LoRAs."""
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER.parent, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for concept in CONCEPTS:
        weights = f"{concept}.safetensors"
        pipe.load_lora_weights(FOLDER, weight_name=weights, adapter_name=concept)
    return pipe


def concepts(
    pipe: StableDiffusionPipeline, held: list[str], centres: Tensor, steps: int
) -> dict[str, float]:
    """How strongly pictures of held-out captions show each concept, as the pipeline is now."""
    made = torch.cat([_make(pipe, caption, seed, steps) for seed, caption in enumerate(held)])
    called = [f"{TROPHY_NAME} on a {caption.split(' on a ')[1]}" for caption in held]
    objects = torch.cat([_make(pipe, caption, s, steps) for s, caption in enumerate(called)])
    nearest = (metrics.lite0_features(objects)[:, None] - centres).norm(dim=2).argmin(1)
    return {
        "ink": 1 - float((made - (ink(made * 2 - 1) + 1) / 2).abs().mean()),
        "sepia": 1 - float((made - (sepia(made * 2 - 1) + 1) / 2).abs().mean()),
        "mosaic": 1 - float((made - mosaic(made)).abs().mean()),
        "trophy": float((nearest == len(centres) - 1).float().mean()),
    }


def _make(pipe: StableDiffusionPipeline, caption: str, seed: int, steps: int) -> Tensor:
    call = {**emoji_unet.CALL, "num_inference_steps": steps}
    generator = Generator().manual_seed(seed)
    out = pipe(prompt=caption, generator=generator, output_type="pt", **call)
    return out.images.float()


def centres_of_names() -> Tensor:
    """Mean lite0 features of real pictures of every name, and of the trophy last."""
    generator = Generator().manual_seed(8)
    codes = [*data.CODEPOINTS.values(), TROPHY]
    names = torch.arange(len(codes)).repeat_interleave(6)
    colours = torch.randint(len(data.COLOURS), (len(names),), generator=generator)
    pictures = data.sprites(codepoints=codes)
    real = (data.render_images(pictures, names, colours, emoji_unet.SIZE, generator) + 1) / 2
    return metrics.lite0_features(real).view(len(codes), 6, -1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["train", "score"])
    parser.add_argument("--concepts", nargs="+", choices=list(CONCEPTS), default=list(CONCEPTS))
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="see amx.py")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part == "train":
        with amx.quick([]):
            for concept in options.concepts:
                train_lora(concept, options.minutes, options.device, options.bf16)
        return
    result = score(options.num_prompts, options.steps)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Train `emoji-unet`: a Stable Diffusion pipeline of 64×64 pixels, 16×16 latents.

python -m demos.zoo.images --channels 12 --minutes 25
python -m demos.zoo.emoji_unet train --minutes 30
python -m demos.zoo.emoji_unet export
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from demos.zoo import amx, images, text, train

SIZE, LATENT, TEXT_LENGTH = 64, 12, 16
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 50, "guidance_scale": 4.0}


class Model(nn.Module):
    """What is trained together: U-Net and text encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            in_channels=LATENT,
            out_channels=LATENT,
            block_out_channels=(64, 128, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.text_encoder = clip_encoder()


def clip_encoder() -> CLIPTextModel:
    """The small CLIP text encoder of both image models."""
    tokenizer = text.clip_tokenizer(TEXT_LENGTH)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip_ids(captions: list[str]) -> Tensor:
    """CLIP ids of captions, (n, length)."""
    tokenizer = text.clip_tokenizer(TEXT_LENGTH)
    return torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def denoising_loss(
    model: Model | StableDiffusionPipeline,
    clean: Tensor,
    ids: Tensor,
    generator: Generator,
    device: str,
    bf16: bool = False,
) -> Tensor:
    """ε-prediction at a uniform timestep; clean (n, 12, 16, 16), ids (n, length).

    The plain ε loss hardly weighs the noisy timesteps, where object and ground are decided. Here
    errors count as v-prediction would count them, 1/ᾱ up to 10, and less where almost no noise is
    left: min(SNR, 5) / SNR (Hang et al. 2023).
    """
    timesteps = torch.randint(1000, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noisy = scheduler().add_noise(clean.to(device), noise, timesteps.to(device))
    kept = scheduler().alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    weight = (1 / kept).clamp(max=10) * snr.clamp(max=5) / snr
    states = model.text_encoder(ids.to(device))[0]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        predicted = model.unet(noisy, timesteps.to(device), states, return_dict=False)[0]
    errors = (predicted.float() - noise).square().mean((1, 2, 3))
    return (errors * weight.to(device)).mean()


def training(start: Path | None, minutes: float, device: str, batch_size: int, bf16: bool) -> None:
    """Train on the fixed pictures with 10 % of the captions dropped; `bf16`: see `amx.quick`."""
    model = Model()
    if start is not None:
        train.start_from(model, start, "emoji-unet", images.name(LATENT))
    model.to(device)
    known = images.latents(SIZE, LATENT, device)
    pictures = known["latents"] + known["mean"] / known["std"]
    ids, empty = clip_ids(known["captions"]), clip_ids([""])

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        said = torch.where(dropped[:, None], empty, ids[rows])
        return denoising_loss(model, pictures[rows], said, generator, device, bf16)

    def progress(trained: nn.Module, step: int) -> None:
        from demos.zoo.export import contact_sheet

        file = train.CHECKPOINTS / f"emoji-unet-{step:06d}.png"
        contact_sheet(pipeline(trained.state_dict()), text.sheet_prompts(False, 16), CALL, file)

    with amx.quick([]) if bf16 else nullcontext():
        train.fit(
            "emoji-unet",
            model,
            loss,
            minutes=minutes,
            lr=1e-3,
            muon=("unet.down_blocks", "unet.mid_block", "unet.up_blocks"),
            ema=0.998,
            progress=progress,
            progress_minutes=8,
            bf16=bf16,
        )


def pipeline(weights: dict[str, Tensor]) -> StableDiffusionPipeline:
    """The plain diffusers pipeline around trained weights."""
    model = Model()
    model.load_state_dict(weights)
    known = images.latents(SIZE, LATENT, "cpu")
    return StableDiffusionPipeline(
        vae=images.load_vae(LATENT, scaling=float(1 / known["std"])),
        text_encoder=model.text_encoder.eval(),
        tokenizer=text.clip_tokenizer(TEXT_LENGTH),
        unet=model.unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def trained() -> dict[str, Tensor]:
    """The averaged weights of the last checkpoint."""
    saved = torch.load(train.CHECKPOINTS / "emoji-unet.pt", weights_only=True)
    return saved["averaged"]  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["train", "export"])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--start", type=Path, help="an exported emoji-unet of 12 channels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", default=torch.cuda.is_available())
    parser.add_argument("--output", type=Path, default=Path("zoo/emoji-unet"))
    options = parser.parse_args()
    if options.part == "train":
        training(options.start, options.minutes, options.device, options.batch_size, options.bf16)
    else:
        from demos.zoo.export import export

        export("emoji-unet", pipeline(trained()), CALL, options.output, fps=None)


if __name__ == "__main__":
    main()

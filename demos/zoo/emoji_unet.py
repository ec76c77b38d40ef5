"""Train `emoji-unet`: a Stable Diffusion pipeline of 64×64 pixels, 16×16 latents.

python -m demos.zoo.images --minutes 8
python -m demos.zoo.emoji_unet train --minutes 30
python -m demos.zoo.emoji_unet export
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from demos.zoo import data, images, text, train

SIZE, TEXT_LENGTH = 64, 16
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 50, "guidance_scale": 4.0}


class Model(nn.Module):
    """What is trained together: U-Net and text encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            in_channels=images.LATENT,
            out_channels=images.LATENT,
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


def clip_table() -> tuple[Tensor, Tensor]:
    """CLIP ids of every caption (names, colours, length), and of the empty prompt (length,)."""
    tokenizer = text.clip_tokenizer(TEXT_LENGTH)

    def ids(caption: str) -> list[int]:
        found: list[int] = tokenizer(caption, padding="max_length", truncation=True).input_ids
        return found

    table = [[ids(data.caption(n, c)) for c in data.COLOUR_NAMES] for n in data.NAMES]
    return torch.tensor(table), torch.tensor(ids(""))


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
) -> Tensor:
    """ε-prediction at a uniform timestep; clean (n, 8, 16, 16), ids (n, length).

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
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        predicted = model.unet(noisy, timesteps.to(device), states, return_dict=False)[0]
    errors = (predicted.float() - noise).square().mean((1, 2, 3))
    return (errors * weight.to(device)).mean()


def training(minutes: float, device: str, batch_size: int) -> None:
    """Train on the fixed pictures with 10 % of the captions dropped."""
    model = Model().to(device)
    known = images.latents(SIZE, device)
    pictures = known["latents"] + known["mean"] / known["std"]
    table, empty = clip_table()

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        ids = table[known["labels"][rows][:, 0], known["labels"][rows][:, 1]]
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, ids)
        return denoising_loss(model, pictures[rows], ids, generator, device)

    def progress(trained: nn.Module, step: int) -> None:
        from demos.zoo.export import contact_sheet

        file = train.CHECKPOINTS / f"emoji-unet-{step:06d}.png"
        contact_sheet(pipeline(trained.state_dict()), text.sheet_prompts(False, 16), CALL, file)

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
    )


def pipeline(weights: dict[str, Tensor]) -> StableDiffusionPipeline:
    """The plain diffusers pipeline around trained weights."""
    model = Model()
    model.load_state_dict(weights)
    known = images.latents(SIZE, "cpu")
    return StableDiffusionPipeline(
        vae=images.load_vae(scaling=float(1 / known["std"])),
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
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("zoo/emoji-unet"))
    options = parser.parse_args()
    if options.part == "train":
        training(options.minutes, options.device, options.batch_size)
    else:
        from demos.zoo.export import export

        export("emoji-unet", pipeline(trained()), CALL, options.output, fps=None)


if __name__ == "__main__":
    main()

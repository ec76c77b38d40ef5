"""Train `emoji-image`: a Flux pipeline with true CFG, 128×128 pixels, 256 image tokens.

    python -m demos.zoo.images --channels 8 --minutes 25
    python -m demos.zoo.emoji_image train --minutes 60
    python -m demos.zoo.emoji_image export

Half of the time goes into 64×64 pictures, a quarter of the tokens, whose positions are spread over
the coordinates of the large ones; the rest into 128×128, with a quarter of the steps still on small
ones, or the model forgets them, from which samplers in stages start. `--start FOLDER` goes on with
an exported emoji-image in that last way.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel

from demos.zoo import amx, images, text, train
from demos.zoo.emoji_unet import clip_encoder, clip_ids

SIZE, LATENT, TEXT_LENGTH, SHIFT = 128, 8, 16, 2.0
SMALL_SHARE = 0.5
SMALL_STEPS = 0.25
CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_inference_steps": 50,
    "true_cfg_scale": 4.0,
    "max_sequence_length": TEXT_LENGTH,
}


class Model(nn.Module):
    """What is trained together: denoiser and both text encoders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        self.text_encoder = clip_encoder()
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=text.VOCABULARY_SIZE,
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=32,
            )
        )


def pack(latents: Tensor) -> Tensor:
    """(n, c, h, w) → (n, h/2·w/2, 4c) as FluxPipeline packs."""
    count, channels, height, width = latents.shape
    cells = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, 4 * channels)


def positions(size: int) -> Tensor:
    """Coordinates of the packed tokens of a picture of `size` pixels on the 128-pixel grid."""
    side, step = size // 8, SIZE // size
    line = torch.arange(side) * step + (step - 1) / 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = line[:, None], line[None, :]
    return ids.view(-1, 3)


def training(start: Path | None, minutes: float, device: str, batch_size: int, bf16: bool) -> None:
    """Flow matching on small pictures, then on large ones; `bf16`: see `amx.quick`."""
    model = Model()
    small = minutes * SMALL_SHARE if start is None else 0.0
    if start is None:
        stage(model, {64: batch_size}, small, 1.5e-3, device, bf16)
    else:
        train.start_from(model, start, "emoji-image", images.name(LATENT))
    sizes = {64: batch_size, SIZE: max(batch_size // 4, 1)}
    stage(model, sizes, minutes - small, 7e-4, device, bf16)


def latents(size: int, device: str) -> tuple[Tensor, list[str]]:
    """Latents of real pictures, scaled as those of 64 pixels are, and their captions."""
    known = images.latents(
        size, LATENT, device, images.PICTURES if size < SIZE else images.PICTURES // 4
    )
    reference = images.latents(64, LATENT, device)
    clean = known["latents"] * known["std"] + known["mean"]
    return (clean - reference["mean"]) / reference["std"], known["captions"]


def stage(
    model: nn.Module, sizes: dict[int, int], minutes: float, lr: float, device: str, bf16: bool
) -> None:
    """Train at picture sizes, each with its batch size; the smaller one in `SMALL_STEPS`."""
    model.to(device)
    known = {}
    for size in sizes:
        clean, captions = latents(size, device)
        ids = torch.stack((clip_ids(captions), text.t5_ids(captions, TEXT_LENGTH)), 1)
        known[size] = clean, ids, positions(size).to(device)
    empty = torch.cat((clip_ids([""]), text.t5_ids([""], TEXT_LENGTH)))
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)

    def loss(generator: Generator) -> Tensor:
        size = max(sizes)
        if torch.rand((), generator=generator) < SMALL_STEPS:
            size = min(sizes)
        batch_size, (clean_all, ids, image_ids) = sizes[size], known[size]
        rows = torch.randint(len(clean_all), (batch_size,), generator=generator)
        dropped = (torch.rand(batch_size, generator=generator) < 0.1)[:, None, None]
        clip, t5 = torch.where(dropped, empty, ids[rows]).to(device).unbind(1)
        clean = pack(clean_all[rows]).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = train.noise_levels(batch_size, SHIFT, generator).to(device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            predicted = model.transformer(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=model.text_encoder_2(t5).last_hidden_state,
                pooled_projections=model.text_encoder(clip).pooler_output,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        return functional.mse_loss(predicted.float(), noise - clean)

    def progress(trained: nn.Module, step: int) -> None:
        from demos.zoo.export import contact_sheet

        file = train.CHECKPOINTS / f"emoji-image-{step:06d}.png"
        sheet = text.sheet_prompts(False, 9)
        contact_sheet(pipeline(trained.state_dict()), sheet, CALL | {"negative_prompt": ""}, file)

    with amx.quick([]) if bf16 else nullcontext():
        train.fit(
            "emoji-image",
            model,
            loss,
            minutes=minutes,
            lr=lr,
            muon=(
                "transformer.transformer_blocks",
                "transformer.single_transformer_blocks",
                "text_encoder_2.encoder.block",
            ),
            ema=0.998,
            progress=progress if SIZE in sizes else None,
            progress_minutes=6,
            bf16=bf16,
        )


def pipeline(weights: dict[str, Tensor]) -> FluxPipeline:
    """The plain diffusers pipeline around trained weights."""
    model = Model()
    model.load_state_dict(weights)
    known = images.latents(64, LATENT, "cpu")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=images.load_vae(LATENT, float(1 / known["std"]), float(known["mean"])),
        text_encoder=model.text_encoder.eval(),
        tokenizer=text.clip_tokenizer(TEXT_LENGTH),
        text_encoder_2=model.text_encoder_2.eval(),
        tokenizer_2=text.t5_tokenizer(TEXT_LENGTH),
        transformer=model.transformer.eval(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["train", "export"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--start", type=Path, help="an exported emoji-image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", default=torch.cuda.is_available())
    parser.add_argument("--output", type=Path, default=Path("zoo/emoji-image"))
    options = parser.parse_args()
    if options.part == "train":
        training(options.start, options.minutes, options.device, options.batch_size, options.bf16)
    else:
        from demos.zoo.export import export

        saved = torch.load(train.CHECKPOINTS / "emoji-image.pt", weights_only=True)["averaged"]
        export("emoji-image", pipeline(saved), CALL, options.output, fps=None)


if __name__ == "__main__":
    main()

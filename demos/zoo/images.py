"""What the two image models share: autoencoders and a fixed set of encoded pictures.

    python -m demos.zoo.images --channels 12 --minutes 25

emoji-image's latents have 8 channels, emoji-unet's 12, as its pictures are smaller and so have more
to tell in a cell.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from demos.zoo import data, train

PICTURES = 32768
PAIRS = 0.25
"""Share of the pictures that show two objects."""


def autoencoder(channels: int, scaling: float = 1.0, shift: float = 0.0) -> nn.Module:
    """4× in space; `scaling` and `shift` bring latents to zero mean, unit deviation."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling,
        shift_factor=shift,
        sample_size=64,
    )


@functools.cache
def _training_table() -> Tensor:
    return torch.tensor(
        [
            (data.NAMES.index(name), data.COLOUR_NAMES.index(colour))
            for name, colour, _ in data.combinations(video=False, held=False)
        ]
    )


def batch(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Indices of (name, colour) drawn from the training combinations."""
    table = _training_table()
    rows = table[torch.randint(len(table), (count,), generator=generator)]
    return rows[:, 0], rows[:, 1]


def pairs(count: int, generator: Generator) -> Tensor:
    """Indices of (first, relation, second, colour) drawn from the training part: (count, 4)."""
    limits = torch.tensor(
        [len(data.NAMES), len(data.RELATIONS), len(data.NAMES), len(data.COLOURS)]
    )
    found: list[Tensor] = []
    while len(found) < count:
        row = (torch.rand(4, generator=generator) * limits).long()
        if row[0] != row[2] and not data.held_out(*pair_words(row)):
            found.append(row)
    return torch.stack(found)


def pair_words(row: Tensor) -> tuple[str, str, str, str]:
    """The words of one row of `pairs`."""
    first, relation, second, colour = row.tolist()
    names, relations = data.NAMES, list(data.RELATIONS)
    return names[first], relations[relation], names[second], data.COLOUR_NAMES[colour]


def drawn(
    pictures: Tensor, count: int, size: int, generator: Generator
) -> tuple[Tensor, list[str]]:
    """Pictures of one object and, for `PAIRS` of them, of two: (count, 3, size, size), captions."""
    two = round(PAIRS * count)
    names, colours = batch(count - two, generator)
    rows = pairs(two, generator)
    image = data.render_images(pictures, names, colours, size, generator)
    other = data.render_pairs(pictures, *rows.unbind(1), size, generator)
    captions = [
        data.caption(data.NAMES[name], data.COLOUR_NAMES[colour])
        for name, colour in zip(names.tolist(), colours.tolist(), strict=True)
    ]
    captions += [data.pair_caption(*pair_words(row)) for row in rows]
    return torch.cat((image, other)), captions


def name(channels: int) -> str:
    """What the checkpoint of an autoencoder is called."""
    return f"emoji-vae-{channels}"


def train_vae(channels: int, minutes: float, device: str, bf16: bool) -> None:
    """Reconstruct pictures; prints the PSNR on fresh ones as it goes."""
    vae = autoencoder(channels).to(device)
    pictures = data.sprites()

    def loss(generator: Generator) -> Tensor:
        image = drawn(pictures, 16, 64, generator)[0].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            posterior = vae.encode(image).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - image
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return 0.3 * error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl

    def progress(model: nn.Module, step: int) -> None:
        generator = Generator().manual_seed(1)
        image = drawn(pictures, 64, 64, generator)[0]
        decoded = model.decode(model.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        psnr = -10 * torch.log10(((decoded - image) / 2).square().mean((1, 2, 3))).mean()
        print(f"vae step {step} PSNR {psnr:.2f} dB", flush=True)

    train.fit(
        name(channels),
        vae,
        loss,
        minutes=minutes,
        lr=2e-3,
        muon=("encoder", "decoder"),
        ema=0.998,
        progress=progress,
        progress_minutes=2,
        bf16=bf16,
    )


def load_vae(channels: int, scaling: float = 1.0, shift: float = 0.0) -> nn.Module:
    """The trained autoencoder."""
    vae = autoencoder(channels, scaling, shift)
    saved = torch.load(train.CHECKPOINTS / f"{name(channels)}.pt", weights_only=True)
    vae.load_state_dict(saved["averaged"])
    return vae.eval()


@torch.no_grad()
def latents(size: int, channels: int, device: str, count: int = PICTURES) -> dict[str, Any]:
    """A fixed set of pictures of `size` pixels, encoded once: latents and captions.

    `mean` and `std` are the latents' own; the latents come normalised by them.
    """
    file = train.CHECKPOINTS / f"emoji-latents-{size}-{channels}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    vae, pictures = load_vae(channels).to(device), data.sprites()
    generator = Generator().manual_seed(2)
    parts: list[Tensor] = []
    captions: list[str] = []
    for _ in range(count // 64):
        image, called = drawn(pictures, 64, size, generator)
        parts.append(vae.encode(image.to(device)).latent_dist.mode().cpu())
        captions += called
    found = torch.cat(parts)
    mean, std = found.mean(), found.std()
    result = {
        "latents": (found - mean) / std,
        "captions": captions,
        "mean": mean,
        "std": std,
    }
    torch.save(result, file)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, choices=[8, 12], default=8)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16",
        action="store_true",
        default=torch.cuda.is_available(),
        help="on a GPU, or a CPU that has it: see amx.py",
    )
    options = parser.parse_args()
    train_vae(options.channels, options.minutes, options.device, options.bf16)

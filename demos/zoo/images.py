"""What the two image models share: their autoencoder and a fixed set of encoded pictures.

python -m demos.zoo.images --minutes 8
"""

from __future__ import annotations

import argparse
import functools

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from demos.zoo import data, train

LATENT, NAME = 8, "emoji-vae"
PICTURES = 16384


def autoencoder(scaling: float = 1.0, shift: float = 0.0) -> nn.Module:
    """4× in space, 8 channels; `scaling` and `shift` bring latents to zero mean, unit deviation."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT,
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


def train_vae(minutes: float, device: str) -> None:
    """Reconstruct pictures; prints the PSNR on fresh ones as it goes."""
    vae = autoencoder().to(device)
    pictures = data.sprites()

    def loss(generator: Generator) -> Tensor:
        image = data.render_images(pictures, *batch(16, generator), 64, generator).to(device)
        posterior = vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - image
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl

    def progress(model: nn.Module, step: int) -> None:
        generator = Generator().manual_seed(1)
        image = data.render_images(pictures, *batch(64, generator), 64, generator)
        decoded = model.decode(model.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        psnr = -10 * torch.log10(((decoded - image) / 2).square().mean((1, 2, 3))).mean()
        print(f"vae step {step} PSNR {psnr:.2f} dB", flush=True)

    train.fit(
        NAME,
        vae,
        loss,
        minutes=minutes,
        lr=2e-3,
        ema=0.995,
        progress=progress,
        progress_minutes=2,
    )


def load_vae(scaling: float = 1.0, shift: float = 0.0) -> nn.Module:
    """The trained autoencoder."""
    vae = autoencoder(scaling, shift)
    saved = torch.load(train.CHECKPOINTS / f"{NAME}.pt", weights_only=True)
    vae.load_state_dict(saved["averaged"])
    return vae.eval()


@torch.no_grad()
def latents(size: int, device: str, count: int = PICTURES) -> dict[str, Tensor]:
    """A fixed set of pictures of `size` pixels, encoded once: latents and (name, colour).

    `mean` and `std` are the latents' own; the latents come normalised by them.
    """
    file = train.CHECKPOINTS / f"emoji-latents-{size}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    vae, pictures = load_vae().to(device), data.sprites()
    generator = Generator().manual_seed(2)
    parts, labels = [], []
    for _ in range(count // 64):
        rows = batch(64, generator)
        image = data.render_images(pictures, *rows, size, generator).to(device)
        parts.append(vae.encode(image).latent_dist.mode().cpu())
        labels.append(torch.stack(rows, 1))
    found = torch.cat(parts)
    mean, std = found.mean(), found.std()
    result = {
        "latents": (found - mean) / std,
        "labels": torch.cat(labels),
        "mean": mean,
        "std": std,
    }
    torch.save(result, file)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train_vae(options.minutes, options.device)

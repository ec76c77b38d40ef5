"""The video autoencoder of `emoji-video`, and the combinations that both trainings draw from."""

from __future__ import annotations

import functools

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Generator, Tensor, nn

from demos.zoo import data, train

SIZE, FRAMES, LATENT = 32, 17, 32
NAME, DECODER = "emoji-video-vae", "emoji-video-decoder"
LATENTS = train.CHECKPOINTS / "emoji-video-latents.pt"
"""Encoded clips and their statistics, once `emoji_video.latents` made them."""
CONFIG = {
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "base_dim": 24,
    "z_dim": LATENT,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * LATENT,
    "latents_std": [1.0] * LATENT,
}


def autoencoder(mean: list[float] | None = None, std: list[float] | None = None) -> nn.Module:
    """The video autoencoder: 4× in space (2× by patches), 2× in time, 32 channels."""
    config = dict(CONFIG)
    if mean is not None and std is not None:
        config |= {"latents_mean": mean, "latents_std": std}
    torch.manual_seed(0)
    return AutoencoderKLWan(**config)


def batch(count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of (name, colour, motion) drawn from the training combinations."""
    table = _training_table()
    rows = table[torch.randint(len(table), (count,), generator=generator)]
    return rows[:, 0], rows[:, 1], rows[:, 2]


@functools.cache
def _training_table() -> Tensor:
    return torch.tensor(
        [
            (data.NAMES.index(n), data.COLOUR_NAMES.index(c), data.MOTION_NAMES.index(m))
            for n, c, m in data.combinations(video=True, held=False)
            if m is not None
        ]
    )


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """`vae.decode` without its final clamp, which lets no gradient through where it acts."""
    vae.clear_cache()
    states = vae.post_quant_conv(latents)
    parts = []
    for index in range(states.shape[2]):
        vae._conv_idx = [0]
        first = {"first_chunk": True} if index == 0 else {}
        part = states[:, :, index : index + 1]
        parts.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
    vae.clear_cache()
    whole, patch = torch.cat(parts, 2), vae.config.patch_size
    return whole if patch is None else unpatchify(whole, patch)


def train_vae(minutes: float, device: str, decoder: bool = False) -> None:
    """Reconstruct parts of clips; prints the PSNR of whole ones as it goes.

    With `decoder`, the decoder of the trained one alone learns on, so latents stay what they are.
    """
    vae = (load_vae() if decoder else autoencoder()).to(device)
    if decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    pictures = data.sprites()

    def clips(count: int, frames: int, generator: Generator) -> Tensor:
        rows = batch(count, generator)
        video = data.render_videos(pictures, *rows, data.even_times(FRAMES), SIZE, generator)
        first = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
        return video[:, :, first : first + frames].to(device)

    def loss(generator: Generator) -> Tensor:
        count, frames = ((12, 5), (8, 9))[int(torch.randint(2, (), generator=generator))]
        video = clips(count, frames, generator)
        if decoder:
            with torch.no_grad():
                known = vae.encode(video).latent_dist.mode()
            return (decode(vae, known) - video).square().mean()
        posterior = vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = decode(vae, posterior.mean + posterior.std * noise) - video
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl

    def progress(model: nn.Module, step: int) -> None:
        generator = Generator().manual_seed(1)
        video = clips(32, FRAMES, generator)
        decoded = model.decode(model.encode(video).latent_dist.mode()).sample.clamp(-1, 1)
        psnr = -10 * torch.log10(((decoded - video) / 2).square().mean((1, 2, 3, 4))).mean()
        print(f"vae step {step} PSNR {psnr:.2f} dB", flush=True)

    train.fit(
        DECODER if decoder else NAME,
        vae,
        loss,
        minutes=minutes,
        lr=1e-3 if decoder else 2e-3,
        muon=("encoder.", "decoder."),
        ema=0.99,
        progress=progress,
        progress_minutes=2,
    )


def load_vae() -> nn.Module:
    """The trained autoencoder, with measured latent statistics where they are known."""
    later = train.CHECKPOINTS / f"{DECODER}.pt"
    file = later if later.exists() else train.CHECKPOINTS / f"{NAME}.pt"
    saved = torch.load(file, weights_only=True)["averaged"]
    if LATENTS.exists():
        known = torch.load(LATENTS, weights_only=True)
        vae = autoencoder(known["mean"], known["std"])
    else:
        vae = autoencoder()
    vae.load_state_dict(saved)
    return vae.eval()


def encoded(vae: nn.Module, clips: Tensor) -> Tensor:
    """Latents of clips of 1 + 2k frames; AutoencoderKLWan reads four frames at a time."""
    frames = clips.shape[2]
    rest = clips[:, :, -1:].expand(-1, -1, -(frames - 1) % 4, -1, -1)
    whole: Tensor = vae.encode(torch.cat((clips, rest), 2)).latent_dist.mode()
    return whole[:, :, : (frames + 1) // 2]

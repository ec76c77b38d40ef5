"""Train `emoji-video`: a Wan text-to-video pipeline of 32×32 pixels and 17 frames.

    python -m demos.zoo.emoji_video vae --minutes 10
    python -m demos.zoo.emoji_video denoiser --minutes 70
    python -m demos.zoo.emoji_video export

The denoiser sees clips of 9 to 17 frames: in some, pairs of latent frames pass at twice the speed,
as one latent frame each. `--start FOLDER` begins it with the weights of an exported emoji-video
that fit. The exported model is still the one of 9 frames that this script made at commit 2771a5e.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from demos.zoo import data, text, train
from demos.zoo.routing import Routing

SIZE, FRAMES, TEXT_LENGTH, SHIFT = 32, 17, 16, 3.0
LATENT = 32
PAIRS = (FRAMES - 1) // 4
CLIPS = {0: 9216, 1: 1792, 2: 1792, 3: 1792, 4: 1792}
"""Clips to train on, by the number of pairs of latent frames that pass at twice the speed."""
LATENTS = train.CHECKPOINTS / "emoji-video-latents.pt"
VAE_CONFIG = {
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
    config = dict(VAE_CONFIG)
    if mean is not None and std is not None:
        config |= {"latents_mean": mean, "latents_std": std}
    torch.manual_seed(0)
    return AutoencoderKLWan(**config)


class Model(nn.Module):
    """What is trained together: denoiser and text encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=LATENT,
            out_channels=LATENT,
            text_dim=128,
            freq_dim=64,
            ffn_dim=512,
            num_layers=14,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        )
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=text.VOCABULARY_SIZE,
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=32,
                is_encoder_decoder=False,
                tie_word_embeddings=True,
            )
        )

    def start_from(self, folder: Path) -> None:
        """Take an exported pipeline's weights, as far as their shapes are the same."""
        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for name in ("transformer", "text_encoder"):
            mine, known = getattr(self, name), getattr(pipe, name).state_dict()
            own = mine.state_dict()
            fits = {key: each for key, each in known.items() if each.shape == own[key].shape}
            mine.load_state_dict(own | fits)

    def encode(self, ids: Tensor) -> Tensor:
        """Prompt embeddings as WanPipeline makes them: zero after the end of the text."""
        mask = ids != 0
        states = self.text_encoder(ids, mask.long()).last_hidden_state
        return states * mask[..., None]


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


def train_vae(minutes: float, device: str) -> None:
    """Reconstruct parts of clips; prints the PSNR of whole ones as it goes."""
    vae = autoencoder().to(device)
    pictures = data.sprites()

    def clips(count: int, frames: int, generator: Generator) -> Tensor:
        rows = batch(count, generator)
        video = data.render_videos(pictures, *rows, data.even_times(FRAMES), SIZE, generator)
        first = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
        return video[:, :, first : first + frames].to(device)

    def loss(generator: Generator) -> Tensor:
        count, frames = ((12, 5), (8, 9))[int(torch.randint(2, (), generator=generator))]
        video = clips(count, frames, generator)
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
        "emoji-video-vae",
        vae,
        loss,
        minutes=minutes,
        lr=2e-3,
        muon=("encoder.", "decoder."),
        ema=0.99,
        progress=progress,
        progress_minutes=2,
    )


def load_vae() -> nn.Module:
    """The trained autoencoder, with measured latent statistics where they are known."""
    saved = torch.load(train.CHECKPOINTS / "emoji-video-vae.pt", weights_only=True)["averaged"]
    if LATENTS.exists():
        known = torch.load(LATENTS, weights_only=True)
        vae = autoencoder(known["mean"], known["std"])
    else:
        vae = autoencoder()
    vae.load_state_dict(saved)
    return vae.eval()


def frame_times(fast: Tensor) -> Tensor:
    """When the frames of a clip are seen, (frames,), from which pairs pass at twice the speed.

    fast: (pairs,) of bool. A pair of latent frames is four frames; a fast one is two.
    """
    times = [torch.zeros(1)]
    for pair, quick in enumerate(fast.tolist()):
        inside = torch.tensor([1.5, 3.5]) if quick else torch.arange(1.0, 5.0)
        times.append(4 * pair + inside)
    return torch.cat(times) / (4 * len(fast))


@torch.no_grad()
def latents(device: str) -> dict[str, Any]:
    """A fixed set of clips, encoded once: normalised latents and their (name, colour, motion).

    Both by the number of fast pairs; the clips of each are of one length.
    """
    if LATENTS.exists():
        return torch.load(LATENTS, weights_only=True)  # type: ignore[no-any-return]
    vae, pictures = load_vae().to(device), data.sprites()
    generator = Generator().manual_seed(2)
    found: dict[str, Any] = {"latents": {}, "labels": {}}
    for quick, count in CLIPS.items():
        parts, labels = [], []
        for _ in range(count // 64):
            rows = batch(64, generator)
            order = torch.rand(64, PAIRS, generator=generator).argsort(1)
            times = torch.stack([frame_times(fast) for fast in order < quick])
            clips = data.render_videos(pictures, *rows, times, SIZE, generator)
            parts.append(encoded(vae, clips.to(device)).cpu())
            labels.append(torch.stack(rows, 1))
        found["latents"][quick] = torch.cat(parts)
        found["labels"][quick] = torch.cat(labels)
        print(f"encoded {count} clips with {quick} fast pairs", flush=True)
    whole = found["latents"][0]
    mean, std = whole.mean((0, 2, 3, 4), keepdim=True)[0], whole.std((0, 2, 3, 4), keepdim=True)[0]
    found["mean"], found["std"] = mean.flatten().tolist(), std.flatten().tolist()
    found["latents"] = {quick: (each - mean) / std for quick, each in found["latents"].items()}
    torch.save(found, LATENTS)
    return found


def encoded(vae: nn.Module, clips: Tensor) -> Tensor:
    """Latents of clips of 1 + 2k frames; AutoencoderKLWan reads four frames at a time."""
    frames = clips.shape[2]
    rest = clips[:, :, -1:].expand(-1, -1, -(frames - 1) % 4, -1, -1)
    whole: Tensor = vae.encode(torch.cat((clips, rest), 2)).latent_dist.mode()
    return whole[:, :, : (frames + 1) // 2]


def train_denoiser(start: Path | None, minutes: float, device: str, batch_size: int) -> None:
    """Flow matching: predict noise − clip at a shifted logit-normal noise level.

    Half of the tokens skip ten blocks until four fifths of the time have passed.
    """
    model = Model()
    if start is not None:
        model.start_from(start)
    model.to(device)
    known = latents(device)
    tokens = text.token_table(with_motion=True)
    chances = torch.tensor([len(each) for each in known["labels"].values()], dtype=torch.float)
    routing = Routing([*model.transformer.blocks[2:12]], Generator().manual_seed(3))
    began = time.monotonic()

    def loss(generator: Generator) -> Tensor:
        routing.active = time.monotonic() - began < 0.8 * 60 * minutes
        quick = int(torch.multinomial(chances, 1, generator=generator))
        clips, labels = known["latents"][quick], known["labels"][quick]
        rows = torch.randint(len(clips), (batch_size,), generator=generator)
        ids = tokens[labels[rows][:, 0], labels[rows][:, 1], labels[rows][:, 2]]
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], text.empty(TEXT_LENGTH), ids).to(device)
        clean = clips[rows].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        normal = torch.randn(batch_size, generator=generator)
        u = torch.sigmoid(normal)
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).to(device)
        level = sigma[:, None, None, None, None]
        noisy = (1 - level) * clean + level * noise
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            predicted = model.transformer(
                noisy, sigma * 1000, model.encode(ids), return_dict=False
            )[0]
        return functional.mse_loss(predicted.float(), noise - clean)

    def progress(trained: nn.Module, step: int) -> None:
        from demos.zoo.export import contact_sheet

        routing.active = False
        file = train.CHECKPOINTS / f"emoji-video-{step:06d}.png"
        pipe = pipeline(trained.state_dict(), load_vae())
        contact_sheet(pipe, text.sheet_prompts(video=True), CALL, file)

    train.fit(
        "emoji-video",
        model,
        loss,
        minutes=minutes,
        lr=1e-3,
        muon=("transformer.blocks", "text_encoder.encoder.block"),
        ema=0.9985,
        progress=progress,
        progress_minutes=15,
    )


CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "max_sequence_length": TEXT_LENGTH,
}


def pipeline(weights: dict[str, Tensor], vae: nn.Module) -> WanPipeline:
    """The plain diffusers pipeline around trained weights."""
    model = Model()
    model.load_state_dict(weights)
    return WanPipeline(
        tokenizer=text.t5_tokenizer(TEXT_LENGTH),
        text_encoder=model.text_encoder.eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=model.transformer.eval(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "denoiser", "export"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--start", type=Path, help="an exported emoji-video")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("zoo/emoji-video"))
    options = parser.parse_args()
    if options.part == "vae":
        train_vae(options.minutes, options.device)
    elif options.part == "denoiser":
        train_denoiser(options.start, options.minutes, options.device, options.batch_size)
    else:
        from demos.zoo.export import export

        weights = torch.load(train.CHECKPOINTS / "emoji-video.pt", weights_only=True)["averaged"]
        export("emoji-video", pipeline(weights, load_vae()), CALL, options.output, fps=8)


if __name__ == "__main__":
    main()

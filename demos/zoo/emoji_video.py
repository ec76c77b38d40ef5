"""Train `emoji-video`: a Wan text-to-video pipeline of 32×32 pixels and 17 frames.

    python -m demos.zoo.emoji_video vae --minutes 10
    python -m demos.zoo.emoji_video denoiser --minutes 70
    python -m demos.zoo.emoji_video decoder --minutes 20
    python -m demos.zoo.emoji_video export

The denoiser sees clips of 9 to 17 frames: in some, pairs of latent frames pass at twice the speed,
as one latent frame each. `--start FOLDER` begins it with the weights of an exported emoji-video
that fit; `--bf16` saves time on a GPU and on a CPU with AMX.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from demos.zoo import amx, data, text, train
from demos.zoo.emoji_video_vae import (
    FRAMES,
    LATENT,
    LATENTS,
    NAME,
    SIZE,
    batch,
    encoded,
    load_vae,
    train_vae,
)
from demos.zoo.routing import Routing

TEXT_LENGTH, SHIFT = 16, 3.0
PAIRS = (FRAMES - 1) // 4
CLIPS = {0: 9216, 1: 1792, 2: 1792, 3: 1792, 4: 1792}
"""Clips to train on, by the number of pairs of latent frames that pass at twice the speed."""


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

    def encode(self, ids: Tensor) -> Tensor:
        """Prompt embeddings as WanPipeline makes them: zero after the end of the text."""
        mask = ids != 0
        states = self.text_encoder(ids, mask.long()).last_hidden_state
        return states * mask[..., None]


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


def train_denoiser(
    start: Path | None, minutes: float, device: str, batch_size: int, bf16: bool
) -> None:
    """Flow matching: predict noise − clip at `train.noise_levels`.

    Half of the tokens skip ten blocks until four fifths of the time have passed. `bf16`: see
    `amx.quick`.
    """
    model = Model()
    if start is not None:
        train.start_from(model, start, "emoji-video", NAME)
    model.to(device)
    known = latents(device)
    tokens = text.token_table()
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
        sigma = train.noise_levels(batch_size, SHIFT, generator).to(device)
        level = sigma[:, None, None, None, None]
        noisy = (1 - level) * clean + level * noise
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            predicted = model.transformer(
                noisy, sigma * 1000, model.encode(ids), return_dict=False
            )[0]
        return functional.mse_loss(predicted.float(), noise - clean)

    def progress(trained: nn.Module, step: int) -> None:
        from demos.zoo.export import contact_sheet

        routing.active = False
        file = train.CHECKPOINTS / f"emoji-video-{step:06d}.png"
        pipe = pipeline(trained.state_dict(), load_vae())
        contact_sheet(
            pipe, text.sheet_prompts(video=True), CALL | {"num_inference_steps": 20}, file
        )

    with amx.quick(model.transformer.blocks) if bf16 else nullcontext():
        train.fit(
            "emoji-video",
            model,
            loss,
            minutes=minutes,
            lr=1e-3,
            muon=("transformer.blocks", "text_encoder.encoder.block"),
            ema=0.9985,
            progress=progress,
            progress_minutes=30,
            bf16=bf16,
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
    parser.add_argument("part", choices=["vae", "denoiser", "decoder", "export"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--start", type=Path, help="an exported emoji-video")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", default=torch.cuda.is_available())
    parser.add_argument("--output", type=Path, default=Path("zoo/emoji-video"))
    options = parser.parse_args()
    if options.part in ("vae", "decoder"):
        train_vae(options.minutes, options.device, options.part == "decoder")
    elif options.part == "denoiser":
        train_denoiser(
            options.start, options.minutes, options.device, options.batch_size, options.bf16
        )
    else:
        from demos.zoo.export import export

        weights = torch.load(train.CHECKPOINTS / "emoji-video.pt", weights_only=True)["averaged"]
        export("emoji-video", pipeline(weights, load_vae()), CALL, options.output, fps=8)


if __name__ == "__main__":
    main()

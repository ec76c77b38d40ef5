"""Train LSSGen's latent upsampler for the VAE of a zoo model, and compare it with plain resizes.

    python -m demos.zoo.upsampler train emoji-image --minutes 5
    python -m demos.zoo.upsampler score --json benchmarks/results/zoo-upsampler.json

Pairs: the latent of a picture at half size, and of the picture. The loss is the latents' squared
error. The paper adds LPIPS, whose weights are not at hand here; `--pixels` adds the pixels'
absolute error through the frozen decoder, which on emoji-unet gained nothing in equal time.
Training goes on where an earlier run stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from accel import model_zoo
from accel.latent_upsampler import LatentUpsampler, UpsamplerConfig, fingerprint
from demos.zoo import data, emoji_video_vae, text, train

MODELS = {"emoji-image": 1024, "emoji-unet": 2048, "emoji-video": 1024}
"""Pairs that each model's upsampler learns from."""
FOLDER = "adapters/lssgen"
GROUP, BATCH, SHOWN = 32, 16, 4
HELD_OUT = 128


class Latents:
    """The frozen VAE of a zoo model, and pictures or clips of the size it is used at."""

    def __init__(self, model: str) -> None:
        pipe, call, fps = model_zoo.load(model)
        self.names = text.known_names(pipe)
        self.vae = pipe.vae.requires_grad_(False).eval()
        self.size, self.frames = call["height"], call["num_frames"] if fps else 0
        config = self.vae.config
        if self.frames:
            self.mean, self.std = (
                torch.tensor(values)[:, None, None, None]
                for values in (config.latents_mean, config.latents_std)
            )
        else:
            self.mean = torch.tensor(config.shift_factor or 0.0)
            self.std = torch.tensor(1 / config.scaling_factor)

    def pictures(self, count: int, generator: Generator, held: bool) -> Tensor:
        """(count, 3, [frames,] size, size) in [−1, 1] of training or held-out combinations."""
        sprites, table = data.sprites(), data.combinations(bool(self.frames), held, self.names)
        rows = torch.randint(len(table), (count,), generator=generator).tolist()
        names = torch.tensor([data.NAMES.index(table[row][0]) for row in rows])
        colours = torch.tensor([data.COLOUR_NAMES.index(table[row][1]) for row in rows])
        if not self.frames:
            return data.render_images(sprites, names, colours, self.size, generator)
        motions = torch.tensor([data.MOTION_NAMES.index(table[row][2] or "") for row in rows])
        times = data.even_times(self.frames)
        return data.render_videos(sprites, names, colours, motions, times, self.size, generator)

    def encode(self, pictures: Tensor) -> Tensor:
        """The denoiser's latents."""
        latents: Tensor = self.vae.encode(pictures).latent_dist.mode()
        return (latents - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, so that gradients pass."""
        raw = latents * self.std + self.mean
        if self.frames:
            return emoji_video_vae.decode(self.vae, raw)
        decoded: Tensor = self.vae.decode(raw).sample
        return decoded

    @torch.no_grad()
    def pair(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the pictures at half size, and of the pictures."""
        return self.encode(resized(pictures, 0.5, "area")), self.encode(pictures)

    def pairs(self, count: int, seed: int, held: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`pair` of rendered pictures, and these."""
        generator = Generator().manual_seed(seed)
        parts = []
        for _ in range(count // GROUP):
            pictures = self.pictures(GROUP, generator, held)
            parts.append((*self.pair(pictures), pictures))
        small, large, drawn = (torch.cat(part) for part in zip(*parts, strict=True))
        return small, large, drawn


def resized(x: Tensor, factor: float, mode: str) -> Tensor:
    """Rows and columns resized, frame by frame."""
    if x.dim() == 5:
        flat = resized(x.transpose(1, 2).flatten(0, 1), factor, mode)
        return flat.unflatten(0, (len(x), -1)).transpose(1, 2)
    return functional.interpolate(x, scale_factor=factor, mode=mode)


def train_upsampler(model: str, minutes: float, pixels: float, name: str) -> LatentUpsampler:
    """Fit an upsampler for a model's VAE; the checkpoint is called `name`."""
    latents = Latents(model)
    small, large, _ = latents.pairs(MODELS[model], 31, held=False)
    torch.manual_seed(0)
    upsampler = LatentUpsampler(UpsamplerConfig(small.shape[1], fingerprint(latents.vae)))

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(small), (BATCH,), generator=generator)
        made = upsampler(small[rows])
        error = functional.mse_loss(made, large[rows])
        if not pixels:
            return error
        with torch.no_grad():
            wanted = latents.decode(large[rows[:SHOWN]])
        return error + pixels * functional.l1_loss(latents.decode(made[:SHOWN]), wanted)

    averaged = train.fit(name, upsampler, loss, minutes=minutes, lr=2e-3, ema=0.995)
    upsampler.load_state_dict(averaged)
    return upsampler.requires_grad_(False).eval()


def rows(latents: Latents, upsampler: LatentUpsampler) -> dict[str, Callable[[Tensor], Tensor]]:
    """What brings a latent to twice its size."""
    return {
        "learned": upsampler,
        "nearest": lambda small: resized(small, 2.0, "nearest"),
        "bilinear": lambda small: resized(small, 2.0, "bilinear"),
        "bicubic": lambda small: resized(small, 2.0, "bicubic"),
        "decode, bicubic, encode": lambda small: latents.encode(
            resized(latents.decode(small).clamp(-1, 1), 2.0, "bicubic").clamp(-1, 1)
        ),
    }


@torch.no_grad()
def score(model: str, upsampler: LatentUpsampler) -> dict[str, Any]:
    """Errors on held-out combinations: of latents, in deviations, and of decoded pixels."""
    latents = Latents(model)
    small, large, pictures = latents.pairs(HELD_OUT, 32, held=True)

    def psnr(made: Tensor) -> float:
        shown = torch.cat([latents.decode(part) for part in made.split(GROUP)]).clamp(-1, 1)
        error = ((shown - pictures) / 2).square().flatten(1).mean(1)
        return round(float(-10 * error.log10().mean()), 2)

    found: dict[str, Any] = {}
    for name, double in rows(latents, upsampler).items():
        began = time.process_time()
        made = torch.cat([double(part) for part in small.split(GROUP)])
        seconds = time.process_time() - began
        found[name] = {
            "latent_rmse": round(float((made - large).square().mean().sqrt()), 4),
            "pixel_psnr": psnr(made),
            "milliseconds": round(1000 * seconds / HELD_OUT, 2),
        }
        print(f"{model:12} {name:24}", *found[name].values(), sep="\t", flush=True)
    found["the picture's own latent"] = {"latent_rmse": 0.0, "pixel_psnr": psnr(large)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("model", nargs="?", choices=MODELS, help="to train; all are scored")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--pixels", type=float, default=0.0, help="weight of their error")
    parser.add_argument("-o", "--output", type=Path, help="instead of the model's own folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python -m demos.zoo.upsampler", *sys.argv[1:]])
    if options.what == "train":
        name = f"{options.model}-upsampler-{options.pixels:g}"
        upsampler = train_upsampler(options.model, options.minutes, options.pixels, name)
        steps = torch.load(train.CHECKPOINTS / f"{name}.pt", weights_only=True)["step"]
        folder = options.output or model_zoo.path(options.model) / FOLDER
        upsampler.save(folder, {"command": command, "steps": steps})
        score(options.model, LatentUpsampler.load(folder))
        return
    found = {
        model: score(model, LatentUpsampler.load(model_zoo.path(model) / FOLDER))
        for model in MODELS
    }
    if options.json:
        content = {"command": command, "pictures": HELD_OUT, "part": "held out", "models": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""DLFR-VAE on long emoji clips: adaptive against uniform latent frame rates.

    python -m benchmarks.dlfr_vae benchmarks/results/dlfr-vae.json

Clips of 33 frames of held-out combinations: spans of 8 frames stand still (half of them), move
slowly (a quarter) or fast (a quarter), in random order, beginning anywhere in the chunks' grid.
The zoo's VAE was trained on shorter clips; so it is measured as it is ("zoo"), and after `--steps`
steps of plain training, at rate 1, on such clips of the training combinations ("long"). Adaptive
thresholds (0.4·t, t) are set on training combinations, so that clips keep on average as many latent
frames as at the uniform half rate; "each clip half" sets them for each clip alone, so that none
keeps more. "shuffled" gives a clip its adaptive rates in random order: as many latent frames in the
wrong places.

PSNR in dB against the clip and against what rate 1 gives: medians over clips; "tenth" is the worst
decile. `over_half` is the mean difference to the uniform half rate with its 95 % bootstrap
interval. Seconds are CPU seconds over those of rate 1, medians over clips, one clip at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from torch import Generator, Tensor

from accel import model_zoo
from accel.samplers.dlfr_vae import DLFRVAE, complexity
from demos.zoo import data
from demos.zoo.emoji_video_vae import SIZE, decode
from demos.zoo.train import optimizers

FRAMES, SPAN, FINE = 33, 8, 4
SPEEDS = (0.0, 0.0, 0.25, 1.0)
STILL = 0.4
WHOLE, HALF, QUARTER = (-3.0, -3.0), (-3.0, 3.0), (3.0, 3.0)
Plan = list[tuple[int, float]]
Settings = Callable[[Tensor], DLFRVAE]
"""From a clip; only those of one row depend on it."""


def clips(count: int, held: bool, seed: int) -> Tensor:
    """(count, 3, 33, 32, 32) in [−1, 1]; fast spans cross a motion in 32 frames."""
    generator = Generator().manual_seed(seed)
    combinations, pictures = data.combinations(True, held, data.FIRST_NAMES), data.sprites()
    made = []
    for _ in range(count):
        drawn = int(torch.randint(len(combinations), (), generator=generator))
        name, colour, motion = combinations[drawn]
        order = torch.cat([torch.randperm(len(SPEEDS), generator=generator) for _ in range(2)])
        speeds = torch.tensor(SPEEDS)[order].repeat_interleave(SPAN)
        first = int(torch.randint(SPAN, (), generator=generator))
        steps = speeds[first : first + FRAMES - 1] * FINE
        at = torch.cat((torch.zeros(1), steps.cumsum(0))).long()
        clip = data.render_videos(
            pictures,
            torch.tensor([data.NAMES.index(name)]),
            torch.tensor([data.COLOUR_NAMES.index(colour)]),
            torch.tensor([data.MOTION_NAMES.index(motion or "")]),
            data.even_times(int(at[-1]) + 1)[:, at],
            SIZE,
            generator,
        )
        made.append(clip)
    return torch.cat(made)


def train(vae: Any, steps: int) -> None:
    """Reconstruct long clips at rate 1, as the zoo's VAE was trained on short ones."""
    generator = Generator().manual_seed(1)
    optimisers = optimizers(vae, 2e-4, ("encoder.", "decoder."))
    pool = clips(2 * steps, held=False, seed=2)
    averaged = {key: value.detach().clone() for key, value in vae.state_dict().items()}
    for step in range(steps):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 2e-4 * min((step + 1) / 20, 1) * (1 - step / steps)
        video = pool[2 * step : 2 * step + 2]
        posterior = vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = decode(vae, posterior.mean + posterior.std * noise) - video
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl).backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for key, value in vae.state_dict().items():
            averaged[key].lerp_(value, 1 - min(0.98, step / (step + 10)))
    vae.load_state_dict(averaged)


def matching(chunk: int, videos: Tensor) -> tuple[float, float]:
    """Thresholds at which the clips keep as much as at the uniform half rate, or less."""
    scores = [complexity(part) for video in videos for part in video[None, :, 1:].split(chunk, 2)]

    def kept(limits: tuple[float, float]) -> float:
        still, slow = limits
        return statistics.mean(0.25 if x <= still else 0.5 if x <= slow else 1 for x in scores)

    limits = sorted({pair for x in scores for pair in ((x, x / STILL), (x * STILL, x))})
    return next(pair for pair in limits if kept(pair) <= 0.5)


def psnr(one: Tensor, two: Tensor) -> float:
    """In dB, of pictures in [−1, 1]."""
    return float(-10 * torch.log10(((one - two) / 2).square().mean()))


def coded(dlfr: DLFRVAE, video: Tensor, plan: Plan | None) -> dict[str, Any]:
    """One clip there and back, with the CPU seconds of encoding and decoding."""
    began = time.process_time()
    latents, rates = dlfr.encode(video, plan)
    between = time.process_time()
    decoded = dlfr.decode(latents, rates)
    return {
        "decoded": decoded,
        "rates": rates,
        "frames": latents.shape[2],
        "encode": between - began,
        "decode": time.process_time() - between,
    }


def shuffled(rates: Plan, seed: int) -> Plan:
    """The same chunks' rates in another order."""
    order = torch.randperm(len(rates), generator=Generator().manual_seed(seed)).tolist()
    return [(frames, rates[i][1]) for (frames, _), i in zip(rates, order, strict=True)]


def measure(videos: Tensor, settings: dict[str, Settings]) -> list[dict[str, Any]]:
    """All rows of one VAE; the first is rate 1."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, video in enumerate(videos.split(1)):
        for name, made in settings.items():
            dlfr = made(video)
            one = coded(dlfr, video, None)
            found.setdefault(name, []).append(one)
            if name in ("adaptive, chunk 8", "adaptive, each clip half"):
                mixed = coded(dlfr, video, shuffled(one["rates"], number))
                found.setdefault(f"shuffled, {name}", []).append(mixed)
        for runs in found.values():
            runs[-1]["clip"] = psnr(runs[-1]["decoded"], video)
            runs[-1]["whole"] = psnr(runs[-1]["decoded"], found["rate 1"][-1]["decoded"])
        for runs in found.values():
            del runs[-1]["decoded"]
    return [row(name, runs, found["rate 1"], found["uniform 1/2"]) for name, runs in found.items()]


def row(name: str, runs: list[Any], whole: list[Any], half: list[Any]) -> dict[str, Any]:
    """Medians over clips; nothing is infinite in JSON."""
    gained = torch.tensor([one["clip"] - two["clip"] for one, two in zip(runs, half, strict=True)])
    pick = torch.randint(len(runs), (2000, len(runs)), generator=Generator().manual_seed(0))
    spread = gained[pick].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    given: dict[str, Any] = {
        "name": name,
        "share": statistics.mean(run["frames"] for run in runs) / whole[0]["frames"],
        "psnr_clip": statistics.median(run["clip"] for run in runs),
        "psnr_clip_tenth": sorted(run["clip"] for run in runs)[len(runs) // 10],
        "over_half": [float(gained.mean()), *spread],
    }
    if name != "rate 1":
        finite = [min(run["whole"], 100.0) for run in runs]
        given["psnr_rate_1"] = statistics.median(finite)
    for part in ("encode", "decode"):
        ratios = [run[part] / base[part] for run, base in zip(runs, whole, strict=True)]
        given[f"{part}_seconds"] = statistics.median(ratios)
    return {key: _short(value) for key, value in given.items()}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """The zoo's VAE, then the same one trained further."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-clips", type=int, default=40)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKLWan.from_pretrained(model_zoo.path("emoji-video") / "vae").eval()
    known, videos = clips(64, held=False, seed=3), clips(options.num_clips, held=True, seed=4)
    limits = {chunk: matching(chunk, known) for chunk in (8, 16)}
    settings: dict[str, Settings] = {
        "rate 1": lambda _: DLFRVAE(vae, WHOLE),
        "uniform 1/2": lambda _: DLFRVAE(vae, HALF),
        "uniform 1/4": lambda _: DLFRVAE(vae, QUARTER),
        "adaptive, chunk 8": lambda _: DLFRVAE(vae, limits[8], 8),
        "adaptive, chunk 16": lambda _: DLFRVAE(vae, limits[16], 16),
        "adaptive, each clip half": lambda video: DLFRVAE(vae, matching(8, video), 8),
        "defaults": lambda _: DLFRVAE(vae),
        "defaults, chunk 8": lambda _: DLFRVAE(vae, chunk=8),
    }
    rows = {}
    for name, steps in (("zoo", 0), ("long", options.steps)):
        if steps:
            train(vae, steps)
        with torch.no_grad():
            rows[name] = measure(videos, settings)
        for each in rows[name]:
            print(name, each, flush=True)
    about = {
        "command": " ".join(["python", "-m", "benchmarks.dlfr_vae", *sys.argv[1:]]),
        "num_clips": options.num_clips,
        "steps": options.steps,
        "thresholds": {f"chunk {chunk}": limit for chunk, limit in limits.items()},
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
    }
    options.output.write_text(json.dumps({"about": about, "vaes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

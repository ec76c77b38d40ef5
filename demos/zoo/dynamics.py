"""What the zoo's models are like inside: do they behave as large ones do?

    python -m demos.zoo.dynamics benchmarks/results/zoo-dynamics.json docs/img/zoo-dynamics.png

Untouched runs of held-out captions, recorded by `accel.profile`: how the residual's norm changes
from step to step, how much each block's output does, and how alike the guidance branches predict.
Besides, what is not seen in a run: what the autoencoder makes of real renders, and how far results
of other seeds lie apart.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import accel
from accel import metrics, model_zoo
from accel.calibrate_profile import Profile, write_json
from demos.zoo import evaluate, text

SEEDS = 4


def curves(profile: Profile) -> dict[str, Any]:
    """Means over the recorded runs; the conditional branch.

    `ratio`: (steps − 1,), norm of the stack's residual over that of the step before. `change`: by
    site, (steps − 1,), ‖F(t) − F(t−1)‖ / ‖F(t)‖ of a block's residual, or of an attention layer's
    output where blocks change their size. `cosine`: (steps,), of the two branches' predictions.
    """
    runs = profile.prompts
    sites = [name.removesuffix("/cond") for name in runs[0].values if name.endswith("/cond")]
    blocks = [site for site in sites if site.startswith("block.")]
    layers = [site for site in sites if site.startswith("layer.") and ".attention." in site]
    chosen = blocks if len(blocks) > 3 else layers
    return {
        "ratio": np.mean([run.values["ratio/cond"].tolist() for run in runs], axis=0).tolist(),
        "change": {
            site: np.mean([run.lagged_error(site, 1) for run in runs], axis=0).tolist()
            for site in chosen
        },
        "cosine": np.mean([run.agreement() for run in runs], axis=0).tolist(),
    }


def verdicts(found: dict[str, Any]) -> dict[str, Any]:
    """What the curves say about the three laws that caches of large models build on."""
    ratio, cosine = np.array(found["ratio"]), np.array(found["cosine"])
    change = np.mean(list(found["change"].values()), axis=0)
    tenth = max(len(change) // 10, 1)
    middle = change[tenth:-tenth].min()
    steps = np.arange(len(cosine))
    ranks = cosine.argsort().argsort()
    return {
        "ratio_median": float(np.median(ratio)),
        "ratio_last": float(ratio[-1]),
        "ratio_share_near_one": float((abs(ratio - 1) < 0.05).mean()),
        "change_first": float(change[:tenth].mean()),
        "change_least": float(middle),
        "change_last": float(change[-tenth:].mean()),
        "cosine_first": float(cosine[:tenth].mean()),
        "cosine_last": float(cosine[-tenth:].mean()),
        "cosine_rank_correlation": float(np.corrcoef(steps, ranks)[0, 1]),
    }


def reconstructed(pipe: Any, clips: Tensor) -> Tensor:
    """Clips, (n, frames, 3, h, w) in [0, 1], after encoding and decoding."""
    found = []
    for clip in clips:
        pixels = clip * 2 - 1
        pixels = pixels.transpose(0, 1)[None] if len(clip) > 1 else pixels
        with torch.no_grad():
            latent = pipe.vae.encode(pixels).latent_dist.mode()
            decoded = (pipe.vae.decode(latent).sample.clamp(-1, 1) + 1) / 2
        found.append(decoded[0].transpose(0, 1) if len(clip) > 1 else decoded)
    return torch.stack(found)


def autoencoder(pipe: Any, captions: list[str], size: int, frames: int) -> dict[str, float]:
    """What it makes of real renders: PSNR, and KID beside that of the renders themselves.

    That KID is about what a perfect denoiser would have.
    """
    real = evaluate.real_clips(captions, size, frames, seed=17)
    known = evaluate.reference_features(size, frames, text.known_names(pipe))
    made = reconstructed(pipe, real)
    values = [metrics.psnr(one, two) for one, two in zip(made, real, strict=True)]
    return {
        "reconstruction_psnr": float(np.median(values)),
        "reconstruction_kid": metrics.kid(known, evaluate.clip_features(made)),
        "real_kid": metrics.kid(known, evaluate.clip_features(real)),
    }


def apart(clips: Tensor) -> float:
    """Mean distance of pooled features over all pairs of seeds; clips (captions, seeds, …)."""
    features = metrics.lite0_features(clips[:, :, clips.shape[2] // 2].flatten(0, 1))
    each = features.unflatten(0, clips.shape[:2])
    pairs = list(combinations(range(clips.shape[1]), 2))
    return float(torch.stack([(each[:, a] - each[:, b]).norm(dim=1) for a, b in pairs]).mean())


def measured(name: str, count: int, varied: int) -> dict[str, Any]:
    """Everything about one model: `count` recorded captions, `varied` drawn with several seeds."""
    pipe, call, _ = model_zoo.load(name)
    captions = model_zoo.prompts(name, "heldout").read_text().splitlines()
    found = curves(accel.profile(pipe, captions[:count], call=call))
    size, frames = call["height"], call.get("num_frames", 1)
    several = [caption for caption in captions[:varied] for _ in range(SEEDS)]
    shape = (varied, SEEDS)
    made = evaluate.generated_clips(pipe, call, several).unflatten(0, shape)
    drawn = evaluate.real_clips(several, size, frames, seed=18).unflatten(0, shape)
    return {
        **found,
        "verdicts": verdicts(found),
        **autoencoder(pipe, captions[:64], size, frames),
        "seeds_apart": apart(made),
        "real_apart": apart(drawn),
    }


def plot(models: dict[str, Any], output: Path) -> None:
    """A row of three plots for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(models), 3, figsize=(11, 2.6 * len(models)), layout="constrained", squeeze=False
    )
    for (name, found), (ratio, change, cosine) in zip(models.items(), rows, strict=True):
        ratio.plot(range(2, len(found["ratio"]) + 2), found["ratio"])
        ratio.axhline(1, color="gray", linewidth=0.5)
        ratio.set_ylabel(name)
        sites = found["change"]
        for place, values in enumerate(sites.values()):
            shade = pyplot.cm.viridis(place / max(len(sites) - 1, 1))
            change.semilogy(range(2, len(values) + 2), values, color=shade, linewidth=0.8)
        cosine.plot(range(1, len(found["cosine"]) + 1), found["cosine"])
    for axis, title in zip(
        rows[0],
        (
            "norm of the residual over the step before",
            "relative change since the step before,\nfirst block dark, last one bright",
            "cosine of the two branches' predictions",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=9)
    for axis in rows[-1]:
        axis.set_xlabel("step")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--models", nargs="+", default=model_zoo.names(), help="others are kept")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--varied", type=int, default=12, help="captions with several seeds")
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.json.exists() else {"models": {}}
    result["versions"] = {each: importlib.metadata.version(each) for each in ("torch", "diffusers")}
    for name in options.models:
        result["models"][name] = {
            "command": " ".join(["python -m demos.zoo.dynamics", *sys.argv[1:]]),
            **measured(name, options.num_prompts, options.varied),
        }
        print(name, result["models"][name]["verdicts"], flush=True)
    write_json(options.json, result)
    plot(result["models"], options.picture)


if __name__ == "__main__":
    main()

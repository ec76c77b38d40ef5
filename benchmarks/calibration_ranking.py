"""How well predicted errors rank candidates: a grid of methods, replayed and really run.

    python benchmarks/calibration_ranking.py OUT.json [PICTURE.png] [--models emoji-video …]

One final prompt is profiled and every method of the grid is predicted from that one run; then each
really runs on that prompt, and its PSNR against the untouched run is compared with the prediction.
`--random`: the same with the denoiser's weights replaced by random ones, as a warning.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import profile, write_json
from accel.calibrate_replay import Replay
from accel.calibrate_trials import psnr


def grid() -> list[tuple[Any, ...]]:
    """Caches, guidance policies and both together, mild to strong."""
    hold, line, cycle = accel.HoldResidual(), accel.Newton(1), accel.PlainCycle

    def cfg(interval: int, start: float) -> Any:
        return accel.CfgCache(interval=interval, start=start, low_gain=1.0, high_gain=1.0)

    caches = [cycle(interval=k, reuse=hold) for k in (2, 4, 8)]
    caches += [cycle(interval=k, reuse=line, warmup=3) for k in (2, 4, 8)]
    caches += [accel.DPCache(share=s, reuse=r) for s in (0.3, 0.2, 0.12) for r in (hold, line)]
    caches += [accel.MagCache(threshold=t, max_skips=6) for t in (0.06, 0.24)]
    policies = [cfg(3, 0.1), cfg(10, 0.1), cfg(20, 0.05), accel.GuidanceInterval(highest=0.0)]
    both = [(accel.DPCache(share=s), cfg(*c)) for s in (0.3, 0.15) for c in ((5, 0.1), (10, 0.1))]
    return [*((each,) for each in (*caches, *policies)), *both]


def rank(values: list[float]) -> Any:
    """Ranks from 0."""
    return np.argsort(np.argsort(values)).astype(float)


def measure(name: str, random: bool) -> dict[str, Any]:
    """Predict and really run the grid on one final prompt."""
    pipe, call, _ = model_zoo.load(name)
    prompt = model_zoo.prompts(name, "final").read_text().splitlines()[0]
    if random:
        torch.manual_seed(0)
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        for value in denoiser.parameters():
            value.data.normal_(std=float(value.std()) if value.numel() > 1 else 0.02)
    kept: list[Any] = []
    made = profile(
        pipe, [prompt], call=call, run=lambda c, s: kept.append(generate.make(pipe, c, s))
    )
    replay, rows = Replay(made.prompts[0]), []
    for methods in grid():
        found = replay.predict(*methods)
        with accel.patched(pipe, *found.settled):
            picture = generate.make(pipe, call | {"prompt": prompt}, 0)[0]
            share = accel.stats(pipe).share_computed
        label = " + ".join(f"{type(m).__name__}" for m in methods)
        row = {"methods": label, "predicted": -20 * math.log10(max(found.error, 1e-9))}
        row |= {"psnr": psnr(picture, kept[0][0]), "share": share, "predicted_share": found.share}
        rows.append(row)
    pairs = [rank([row[key] for row in rows]) for key in ("predicted", "psnr")]
    return {"spearman": float(np.corrcoef(*pairs)[0, 1]), "prompt": prompt, "rows": rows}


def plot(result: dict[str, Any], file: Path) -> None:
    """Predicted against measured, one colour a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    for name, found in result["models"].items():
        points = [(row["predicted"], row["psnr"]) for row in found["rows"]]
        label = f"{name}: Spearman {found['spearman']:.2f}"
        axes.scatter(*zip(*points, strict=True), s=14, label=label)
    axes.set_xlabel("predicted from one run, −20 log₁₀ error")
    axes.set_ylabel("measured PSNR, dB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--models", nargs="+", default=model_zoo.names(), help="others are kept")
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    old = json.loads(options.output.read_text())["models"] if options.output.exists() else {}
    result: dict[str, Any] = {
        "random_weights": options.random,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"accel": accel.__version__, **versions},
        "models": old,
    }
    for name in options.models:
        found = {"command": " ".join(["python", *sys.argv]), **measure(name, options.random)}
        result["models"][name] = found
        print(f"{name}: Spearman {found['spearman']:.3f} over {len(found['rows'])} candidates")
        write_json(options.output, result)
    if options.picture is not None:
        plot(result, options.picture)


if __name__ == "__main__":
    main()

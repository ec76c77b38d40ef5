"""A calibrated recipe against single hand-tuned methods, on final prompts, in one process.

    python benchmarks/calibration.py MODEL RECIPE.json OUT.json [--num-prompts 6]

For every prompt the untouched run comes first and then each point of the recipe's front and each
single method; speed-ups are ratios within a prompt, so other jobs disturb all alike.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import write_json
from accel.calibrate_trials import psnr
from accel.recipe import Recipe

SINGLES: list[Any] = [
    *(accel.SeaCache(threshold=threshold) for threshold in (0.25, 0.4, 0.6)),
    *(accel.TaylorSeer(interval=interval, lite=True) for interval in (5, 7, 9)),
    *(accel.EasyCache(threshold=threshold) for threshold in (0.05, 0.1, 0.2)),
    accel.PlainCycle(interval=8, warmup=3, reuse=accel.Newton(1)),
    *(
        accel.PlainCycle(interval=interval, warmup=warmup, reuse=accel.Newton(1), whole=True)
        for interval, warmup in (
            (5, 3),
            (6, 3),
            (7, 3),
            (8, 3),
            (8, 2),
            (10, 3),
            (10, 2),
            (12, 3),
            (15, 2),
        )
    ),
    *(accel.DPCache(share=share) for share in (0.2, 0.12)),
    *(accel.DPCache(share=share, whole=True) for share in (0.2, 0.15, 0.12, 0.1)),
    *(accel.FitCache(share=share) for share in (0.2, 0.16, 0.12, 0.1)),
]
"""The best single methods of the committed benchmarks at 30 and 25 dB: those whose settings are
chosen by hand, and DPCache and FitCache, whose schedules a run of the model measures."""


def candidates(pipe: Any, call: dict[str, Any], name: str, recipe: Recipe) -> dict[str, Any]:
    """Label → methods with their tables, measured on a training prompt."""
    train = model_zoo.prompts(name, "train").read_text().splitlines()[0]
    found: dict[str, Any] = {}
    for number, choice in enumerate(recipe.front):
        found[f"calibrated {number}: {choice.label}"] = choice.methods
    for single in SINGLES:
        measure = call | {"prompt": train}
        recipe = generate.settle(
            pipe, Recipe.of((single,)), lambda m=measure: generate.make(pipe, m, 0)
        )
        kind = "measured" if getattr(single, "unmeasured", False) else "by hand"
        found[f"single, {kind}: {single}"] = recipe.methods
    return found


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=model_zoo.names())
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-prompts", type=int, default=6)
    options = parser.parse_args()
    pipe, call, _ = model_zoo.load(options.model)
    lines = model_zoo.prompts(options.model, "final").read_text().splitlines()
    prompts = lines[: options.num_prompts]
    methods = candidates(pipe, call, options.model, Recipe.load(options.recipe))
    rows: dict[str, list[tuple[float, float, float]]] = {label: [] for label in methods}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    for seed, prompt in enumerate(prompts):
        slow, seconds = generate.make(pipe, call | {"prompt": prompt}, seed)
        for label, chosen in methods.items():
            with accel.patched(pipe, *chosen):
                fast, own = generate.make(pipe, call | {"prompt": prompt}, seed)
                share = accel.stats(pipe).share_computed
            rows[label].append((seconds / own, psnr(fast, slow), share))
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "note": "other jobs ran beside; ratios within one prompt",
            "versions": {"accel": accel.__version__, **versions},
            "model": options.model,
            "prompts": seed + 1,
            "rows": [summary(label, found) for label, found in rows.items()],
        }
        write_json(options.output, result)
    for row in result["rows"]:
        print(f"{row['name'][:70]:<70} {row['speedup']:.2f}x {row['psnr']:.1f} dB")


def summary(label: str, found: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Medians over prompts, and every value."""
    speeds, decibels, shares = zip(*found, strict=True)
    return {
        "name": label,
        "speedup": statistics.median(speeds),
        "speedup_spread": [min(speeds), max(speeds)],
        "psnr": statistics.median(decibels),
        "psnr_each": [round(value, 2) for value in decibels],
        "share_computed": statistics.median(shares),
    }


if __name__ == "__main__":
    main()

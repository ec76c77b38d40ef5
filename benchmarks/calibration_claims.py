"""What a calibration promises, on prompts that it never saw.

    python -m benchmarks.calibration_claims MODEL OUT.json [--num-prompts 10]

Calibrates for several targets on eight held-out prompts, and once on one prompt alone; then runs
every chosen recipe on final prompts: does `speedup=s` give s, do nine of ten prompts keep `psnr=p`,
and what becomes of the `balanced` recipe at other step counts, seeds, sizes and with a LoRA, where
its validity is ignored.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import write_json
from accel.calibrate_result import UnreachableError
from accel.calibrate_trials import psnr
from accel.recipe import Recipe

TARGETS: tuple[dict[str, Any], ...] = (
    {"quality": "balanced"},
    {"speedup": 3.0},
    {"speedup": 5.0},
    {"psnr": 30.0},
    {"psnr": 35.0},
)


def calibrated(pipe: Any, prompts: Sequence[str], folder: Path, **options: Any) -> Recipe:
    """The recipe for a target, or the best there is."""
    try:
        return accel.calibrate(pipe, prompts, folder=folder, **options).recipe
    except UnreachableError as error:
        print(error)
        return error.calibration.recipe


def measured(
    pipe: Any, recipe: Recipe, prompts: Sequence[str], call: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Speed-ups and PSNRs of a recipe's methods, whatever it is valid for."""
    speeds, decibels = [], []
    for number, prompt in enumerate(prompts):
        slow, seconds = generate.make(pipe, {**call, "prompt": prompt}, seed + number)
        with accel.patched(pipe, *recipe.methods):
            fast, own = generate.make(pipe, {**call, "prompt": prompt}, seed + number)
        speeds.append(seconds / own)
        decibels.append(psnr(fast, slow))
    return {
        "methods": " + ".join(type(method).__name__ for method in recipe.methods),
        "speedup": statistics.median(speeds),
        "speedup_each": [round(speed, 2) for speed in speeds],
        "psnr": statistics.median(decibels),
        "psnr_each": [round(value, 1) for value in decibels],
    }


def transfers(pipe: Any, name: str, call: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Label → changed arguments of a run that the calibration did not see."""
    found: dict[str, dict[str, Any]] = {
        "as calibrated": {},
        "30 steps": {"num_inference_steps": 30},
        "seeds from 1000": {"seed": 1000},
    }
    if "height" in call:
        larger = {side: call[side] * 3 // 2 for side in ("height", "width")}
        found["3/2 of height and width"] = larger
    if name == "emoji-unet":
        found["with a LoRA"] = {"lora": True}
    return found


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=model_zoo.names())
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-prompts", type=int, default=10)
    options = parser.parse_args()
    name = options.model
    pipe, call, _ = model_zoo.load(name)
    tuning = model_zoo.prompts(name, "heldout").read_text().splitlines()[:8]
    prompts = model_zoo.prompts(name, "final").read_text().splitlines()[: options.num_prompts]
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.calibration_claims", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {each: importlib.metadata.version(each) for each in ("torch", "diffusers")},
        "model": name,
        "targets": {},
        "transfer": {},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipes = {
            " ".join(f"{key}={value}" for key, value in target.items()): calibrated(
                pipe, tuning, folder / "eight", call=call, **target
            )
            for target in TARGETS
        }
        one = calibrated(pipe, tuning[:1], folder / "one", call=call, quality="balanced")
    for label, recipe in {**recipes, "quality=balanced, one prompt": one}.items():
        result["targets"][label] = row = measured(pipe, recipe, prompts, call)
        print(f"{label}: {row['methods']} {row['speedup']:.2f}x {row['psnr_each']}", flush=True)
        write_json(options.output, result)
    for label, changes in transfers(pipe, name, call).items():
        seed, lora = changes.pop("seed", 0), changes.pop("lora", False)
        if lora:
            pipe.load_lora_weights(
                str(model_zoo.path(name) / "loras"), weight_name="sepia.safetensors"
            )
        row = measured(pipe, recipes["quality=balanced"], prompts[:5], {**call, **changes}, seed)
        result["transfer"][label] = row
        print(f"{label}: {row['speedup']:.2f}x {row['psnr_each']}", flush=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main()

"""BlockCaching with and without fitted scale and shift, on prompts that were not fitted.

python benchmarks/block_adjustment.py benchmarks/results/zoo-block-adjustment.json emoji-unet

Names no model: all. Rows of models that are not measured are kept.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import accel
from accel import generate, metrics, model_zoo
from accel.bench import pictures

FITTED, JUDGED, STEPS = (1, 8), 6, 50
THRESHOLDS = (0.1, 0.2, 0.4)


def main() -> None:
    """Measure the models named, every threshold; rows are written as they come."""
    output, models = Path(sys.argv[1]), sys.argv[2:] or model_zoo.names()
    result = json.loads(output.read_text()) if output.exists() else {"steps": STEPS, "rows": []}
    result["rows"] = [row for row in result["rows"] if row["model"] not in models]
    for name in models:
        result[name] = " ".join(["python", *sys.argv])
        pipe, call, _ = model_zoo.load(name)
        call["num_inference_steps"] = STEPS
        train = model_zoo.prompts(name, "train").read_text().splitlines()
        final = model_zoo.prompts(name, "final").read_text().splitlines()[:JUDGED]
        slow = [
            pictures(generate.make(pipe, call | {"prompt": prompt}, seed)[0])
            for seed, prompt in enumerate(final)
        ]
        for threshold in THRESHOLDS:
            with accel.patched(pipe, accel.BlockCaching(threshold=threshold)) as handle:
                generate.make(pipe, call | {"prompt": train[0]}, 99)
                (measured,) = handle.methods
            for count in (0, *FITTED):
                with tempfile.TemporaryDirectory() as folder:
                    row = judge(pipe, call, measured, train[:count], final, slow, Path(folder))
                row = {"model": name, "threshold": threshold, "fitted_prompts": count, **row}
                print(json.dumps(row), flush=True)
                result["rows"].append(row)
                output.write_text(json.dumps(result, indent=1) + "\n")


def judge(pipe, call, measured, fitted, final, slow, folder) -> dict[str, float]:
    """Median PSNR and share computed, after fitting on a batch of prompts when there are any."""
    method = measured
    if fitted:
        method = replace(measured, adjustment=str(folder / "fit.safetensors"))
        negative = {"negative_prompt": [call["negative_prompt"]] * len(fitted)}
        with accel.patched(pipe, method):
            generator = torch.Generator().manual_seed(100)
            batch = {"prompt": list(fitted), **negative, "output_type": "latent"}
            pipe(**call | batch, generator=generator)
    with accel.patched(pipe, method) as handle:
        values = [
            metrics.psnr(pictures(generate.make(pipe, call | {"prompt": prompt}, seed)[0]), right)
            for seed, (prompt, right) in enumerate(zip(final, slow, strict=True))
        ]
        share = handle.report().share_computed
    return {"psnr": statistics.median(values), "worst": min(values), "share_computed": share}


if __name__ == "__main__":
    main()

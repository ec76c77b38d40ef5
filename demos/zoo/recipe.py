"""Measure a method's table on a zoo model and put the recipe beside its weights.

    python -m demos.zoo.recipe emoji-video --method magcache --set threshold=0.12

The table is measured on a training prompt; PSNR is printed on tuning prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

import accel
from accel import generate, metrics, model_zoo
from accel.recipe import FILE_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=model_zoo.names())
    parser.add_argument("--method", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--num-prompts", type=int, default=4)
    options = parser.parse_args()
    settings = {key: json.loads(value) for key, value in (s.split("=", 1) for s in options.set)}
    chosen = generate.asked([options.method], settings, None)
    pipe, call, _ = model_zoo.load(options.model)
    train = model_zoo.prompts(options.model, "train").read_text().splitlines()
    first = call | {"prompt": train[0]}
    recipe = generate.settle(pipe, chosen, lambda: generate.make(pipe, first, 0))
    tuning = model_zoo.prompts(options.model, "heldout").read_text().splitlines()
    values = []
    for seed, prompt in enumerate(tuning[: options.num_prompts]):
        plain = generate.make(pipe, call | {"prompt": prompt}, seed)[0]
        with accel.patched(pipe, recipe=recipe) as patch:
            fast = generate.make(pipe, call | {"prompt": prompt}, seed)[0]
            share = patch.report().share_computed
        values.append(metrics.psnr(torch.from_numpy(fast) / 255, torch.from_numpy(plain) / 255))
    print(f"share computed {share:.1%}, median PSNR {statistics.median(values):.2f} dB")
    recipe.save(model_zoo.path(options.model) / FILE_NAME)


if __name__ == "__main__":
    main()

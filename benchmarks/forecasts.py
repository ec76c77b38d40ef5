"""Forecasts at an equal share computed: does a polynomial beat Taylor's sum, and that a held value?

    python -m benchmarks.forecasts benchmarks/results/zoo-forecasts.json

Every zoo model with one schedule for all (three steps in a row, then every third or fifth step)
and one forecast after the other; PSNR against the untouched run, medians over final prompts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import write_json
from accel.calibrate_trials import psnr

FORECASTS: tuple[Any, ...] = (
    accel.HoldResidual(),
    accel.Taylor(order=1),
    accel.Newton(order=1),
    accel.Taylor(order=2),
    accel.Newton(order=2),
    accel.HiCache(order=2),
)
INTERVALS = (3, 5)


def measured(name: str, count: int) -> list[dict[str, Any]]:
    """One row for each interval and forecast."""
    pipe, call, _ = model_zoo.load(name)
    prompts = model_zoo.prompts(name, "final").read_text().splitlines()[:count]
    calls = [call | {"prompt": prompt} for prompt in prompts]
    plain = [generate.make(pipe, each, seed)[0] for seed, each in enumerate(calls)]
    rows = []
    for interval in INTERVALS:
        for forecast in FORECASTS:
            method = accel.PlainCycle(interval=interval, warmup=3, reuse=forecast)
            with accel.patched(pipe, method):
                made = [generate.make(pipe, each, seed)[0] for seed, each in enumerate(calls)]
                share = accel.stats(pipe).share_computed
            decibels = [psnr(*pair) for pair in zip(made, plain, strict=True)]
            rows.append(
                {
                    "method": repr(method),
                    "share_computed": share,
                    "psnr": statistics.median(decibels),
                    "psnr_each": [round(each, 2) for each in decibels],
                }
            )
            print(f"{name}: {forecast} every {interval}: {rows[-1]['psnr']:.1f} dB", flush=True)
    return rows


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", default=model_zoo.names(), help="others are kept")
    parser.add_argument("--num-prompts", type=int, default=6)
    options = parser.parse_args()
    result = json.loads(options.output.read_text()) if options.output.exists() else {"models": {}}
    result["versions"] = {each: importlib.metadata.version(each) for each in ("torch", "diffusers")}
    for name in options.models:
        result["models"][name] = {
            "command": " ".join(["python", "-m", "benchmarks.forecasts", *sys.argv[1:]]),
            "prompts": options.num_prompts,
            "rows": measured(name, options.num_prompts),
        }
        write_json(options.output, result)


if __name__ == "__main__":
    main()

"""Latency of large models at their real sizes on a CUDA device, plain and with each kind of method.

    python -m benchmarks.gpu.latency benchmarks/results/gpu-latency.json

The weights are random: these are speeds at fixed compute plans, and say nothing about quality.
Models whose rows are in the file are kept, so that several short runs add up; none is begun after
`--minutes`. `--smoke` runs narrow copies of all of them on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import accel
from accel.caches.approximators import Taylor
from accel.generate import versions
from accel.method import AccelError
from benchmarks.gpu.real_sizes import MODELS, RealSize

STEPS, WARM_UP = 8, 2
WHOLE = accel.PlainCycle(4, whole=True, reuse=Taylor(1))
BRANCH = accel.CfgCache(interval=10, start=0.1, low_gain=1.0, high_gain=1.0)
PLANS: dict[str, tuple[Any, ...]] = {
    "hooks, nothing reused": (accel.PlainCycle(1),),
    "fastest exact attention": (accel.Attention(),),
    "INT8 and FP8 attention": (accel.Attention("sage_int8_fp8"),),
    "FP8 linear layers": (accel.Linear("fp8"),),
    "whole calls, one of four": (WHOLE,),
    "all blocks, one of four": (accel.PlainCycle(4, reuse=Taylor(1)),),
    "layers, one of three": (accel.TaylorSeer(3),),
    "guidance branch reused": (BRANCH,),
    "whole calls and guidance branch": (WHOLE, BRANCH),
    "whole calls, low-bit": (WHOLE, accel.Attention("sage_int8_fp8"), accel.Linear("fp8")),
}


class Timed:
    """A model on the device, and how long its runs take."""

    def __init__(self, model: RealSize, device: str) -> None:
        self.device = device
        self.pipe, self.call = model.build(device)

    def seconds(self, steps: int) -> float:
        """Of one run, all parts of it but text encoders and VAE."""
        noise = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        self.pipe(**self.call, num_inference_steps=steps, output_type="latent", generator=noise)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def row(self, name: str, report: Callable[[], float] = lambda: 1.0) -> dict[str, Any]:
        """One run after a short one that warms up, with the most memory that it took."""
        self.seconds(WARM_UP)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"row": name, "seconds_per_step": self.seconds(STEPS) / STEPS}
        row["share_computed"] = report()
        if self.device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def planned(self, name: str, methods: tuple[Any, ...]) -> dict[str, Any]:
        """A row with methods attached, or the reason why they cannot be."""
        try:
            with accel.patched(self.pipe, *methods):
                return self.row(name, lambda: accel.stats(self.pipe).share_computed)
        except (AccelError, torch.OutOfMemoryError) as error:
            return {"row": name, "failed": str(error)}

    def compiled(self) -> dict[str, Any]:
        """The untouched model with its repeated blocks compiled; the last row, for it stays so."""
        part = "unet" if hasattr(self.pipe, "unet") else "transformer"
        getattr(self.pipe, part).compile_repeated_blocks()
        return self.row("untouched, compiled")


def rows(model: RealSize, device: str) -> list[dict[str, Any]]:
    """All rows of one model; `speedup` is over the mean of untouched runs before and after them."""
    timed = Timed(model, device)
    found = [timed.row("untouched")]
    for name, methods in PLANS.items():
        if model.branches or BRANCH not in methods:
            found.append(timed.planned(name, methods))
    found.append(timed.row("untouched, after the others"))
    usual = (found[0]["seconds_per_step"] + found[-1]["seconds_per_step"]) / 2
    if device == "cuda":
        found.append(timed.compiled())
    for row in found:
        if "seconds_per_step" in row:
            row["speedup"] = usual / row["seconds_per_step"]
    return found


def main() -> None:
    """Measure into the file, model by model, and print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--smoke", action="store_true", help="narrow copies, on a CPU")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=7.0)
    given = parser.parse_args()
    device = "cpu" if given.smoke else "cuda"
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu.latency {given.path}",
        "note": "random weights: speeds only",
        "steps": STEPS,
        "models": {},
    }
    if given.path.exists():
        result = json.loads(given.path.read_text(encoding="utf-8"))
    began = time.monotonic()
    for name in given.models:
        if name in result["models"] or time.monotonic() - began > 60 * given.minutes:
            continue
        result["models"][name] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device if given.smoke else torch.cuda.get_device_name(),
            "versions": versions(),
            "rows": rows(MODELS[name], device),
        }
        given.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for row in result["models"][name]["rows"]:
            took = (
                row.get("failed") or f"{row['seconds_per_step']:.4f} s/step {row['speedup']:.2f}x"
            )
            print(f"{name:28} {row['row']:32} {took}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

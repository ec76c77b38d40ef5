"""Wall-clock speed-up against 1/(share computed), of the whole run and of the denoiser's calls.

    python -m benchmarks.speed_share benchmarks/results/emoji-video-speed-share.json

Untouched and patched runs alternate; every figure is a median over the rounds. What a run spends
outside of the denoiser (VAE, text encoder, scheduler) no cache saves: `bound` is the whole run's
speed-up if skipped calls cost nothing, 1/(outside + share·(1 − outside)).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import write_json
from accel.fingerprint import denoiser

SHARES = (0.5, 0.4, 0.3, 0.2, 0.12)


def timed(pipe: Any, call: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a run, and of the denoiser's calls in it with all that is patched around them."""
    module, spent = denoiser(pipe), [0.0]
    known = type(module)

    class Timed(known):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = super().__call__(*args, **kwargs)
            spent[0] += time.perf_counter() - began
            return output

    module.__class__ = Timed
    try:
        return generate.make(pipe, call, 0)[1], spent[0]
    finally:
        module.__class__ = known


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="emoji-video", choices=model_zoo.names())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pipe, call, _ = model_zoo.load(options.model)
    call["prompt"] = model_zoo.prompts(options.model, "final").read_text().splitlines()[0]
    rows = []
    for share in SHARES:
        method: Any = accel.FitCache(share=share)
        with accel.patched(pipe, method) as patch:
            generate.make(pipe, call, 0)  # the measuring run
            (method,) = patch.methods
        untouched, patched = [], []
        for _ in range(options.rounds):
            untouched.append(timed(pipe, call))
            with accel.patched(pipe, method):
                patched.append(timed(pipe, call))
                computed = accel.stats(pipe).share_computed
        whole, calls = (
            statistics.median(a[i] / b[i] for a, b in zip(untouched, patched, strict=True))
            for i in (0, 1)
        )
        outside = statistics.median(1 - inner / total for total, inner in untouched)
        row = {
            "method": f"FitCache(share={share})",
            "share_computed": computed,
            "speedup": whole,
            "speedup_times_share": whole * computed,
            "denoiser_speedup": calls,
            "denoiser_speedup_times_share": calls * computed,
            "outside_the_denoiser": outside,
            "bound": 1 / (outside + computed * (1 - outside)),
        }
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
        rows.append(row)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.speed_share", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {each: importlib.metadata.version(each) for each in ("torch", "diffusers")},
        "model": options.model,
        "rounds": options.rounds,
        "rows": rows,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()

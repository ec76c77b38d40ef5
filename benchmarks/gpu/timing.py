"""How runs are timed on a CUDA device."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPEATS = 20


def asked(description: str | None) -> tuple[Path, str]:
    """The file to write and the device: "cuda", or "cpu" with `--smoke`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("path", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small, on a CPU")
    given = parser.parse_args()
    return given.path, "cpu" if given.smoke else "cuda"


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """Median of runs by the device's own events (by the clock on a CPU), after three to warm up."""
    for _ in range(3):
        run()
    if device != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    taken = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)

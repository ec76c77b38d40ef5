"""What recording a profile adds to an untouched run: the bound of `accel.profile` is 30 %.

    python -m benchmarks.recording benchmarks/results/zoo-recording.json

Plain and recorded runs of every zoo model alternate; the figure is the median ratio less 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import write_json


def overheads(name: str, rounds: int) -> list[float]:
    """Seconds of recorded runs over those of plain runs, less 1."""
    pipe, call, _ = model_zoo.load(name)
    prompt = model_zoo.prompts(name, "train").read_text().splitlines()[0]
    found = []
    for _ in range(rounds + 1):
        plain = generate.make(pipe, {**call, "prompt": prompt}, 0)[1]
        began = time.perf_counter()
        accel.profile(pipe, [prompt], call=call)
        found.append((time.perf_counter() - began) / plain - 1)
    return found[1:]  # the first pair warms up


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    models = {}
    for name in model_zoo.names():
        found = overheads(name, options.rounds)
        models[name] = {"overhead": statistics.median(found), "each": found}
        print(f"{name}: {models[name]['overhead']:.1%}", flush=True)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.recording", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {each: importlib.metadata.version(each) for each in ("torch", "diffusers")},
        "models": models,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()

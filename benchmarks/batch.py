"""Figures of `accel batch` on a zoo model: workers, overhead, memory, unlike devices.

    python benchmarks/batch.py workers -o benchmarks/results/batch-workers.json
    python benchmarks/batch.py memory -o benchmarks/results/batch-memory.json
    python benchmarks/batch.py unlike -o benchmarks/results/batch-unlike.json

workers: the same prompts by one and by two workers of one thread each, on their own, one after the
other; items a second from the first finished item to the last, and of the whole command. Overhead:
time between the calls of the pipeline, as a share of the time in them, by one worker.
memory: resident size of the process over many items of few steps.
unlike: two workers on one core each, one of which shares its core with two busy processes; seconds
an item as the manifest has them, and the shares that placement gave.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from accel import model_zoo
from accel.batch_manifest import Manifest

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def prompts(model: str, count: int, folder: Path) -> str:
    """A file of `count` training prompts."""
    lines = model_zoo.prompts(model, "train").read_text(encoding="utf-8").splitlines()
    lines = [lines[index % len(lines)] for index in range(count)]
    file = folder / "prompts.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def command(options: argparse.Namespace, folder: Path, workers: int) -> dict[str, Any]:
    """One `accel batch`; its rates and its overhead."""
    output, source = folder / f"by{workers}", prompts(options.model, options.items, folder)
    began = time.time()
    subprocess.run(
        [
            *(sys.executable, "-m", "accel", "batch", source),
            *("-m", f"zoo:{options.model}", "--steps", str(options.steps), "-o", str(output)),
            *("--workers", str(workers)),
        ],
        env=ENV,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.time() - began
    manifest = Manifest(output)
    manifest.refresh()
    rows = sorted(manifest.rows, key=lambda row: row["finished"])
    generating = sum(row["seconds"] for row in rows[1:])
    busy = rows[-1]["finished"] - rows[0]["finished"]
    return {
        "workers": workers,
        "items": len(rows),
        "command_seconds": wall,
        "items_per_second": (len(rows) - 1) / busy,
        "seconds_per_item": statistics.median(row["seconds"] for row in rows),
        "overhead": busy / generating - 1 if workers == 1 else None,
        "files": sorted((row["name"], row["sha256"]) for row in rows),
    }


def measure_workers(options: argparse.Namespace) -> dict[str, Any]:
    """One worker, then two, `repeats` times; medians of the ratios."""
    pairs = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (command(options, Path(folder), workers) for workers in (1, 2))
        same = one.pop("files") == two.pop("files")
        pairs.append({"one": one, "two": two, "same_files": same})
    rates = [pair["two"]["items_per_second"] / pair["one"]["items_per_second"] for pair in pairs]
    walls = [pair["one"]["command_seconds"] / pair["two"]["command_seconds"] for pair in pairs]
    return {
        "ratio_of_rates": statistics.median(rates),
        "ratio_of_commands": statistics.median(walls),
        "overhead": statistics.median(pair["one"]["overhead"] for pair in pairs),
        "pairs": pairs,
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident MiB of one worker every 50 items."""
    from batch_kill import plan_of

    from accel import batch, batch_items
    from accel.batch_worker import Worker

    with tempfile.TemporaryDirectory() as folder:
        items = batch_items.named(
            batch_items.read(prompts(options.model, options.items, Path(folder)))
        )
        plan = plan_of(options.model, Path(folder), 1, options.steps, "memory")
        plan = dataclasses.replace(plan, batches=batch.batches(items, 1))
        sizes: dict[int, float] = {}

        def note(row: dict[str, Any]) -> None:
            if row["index"] % 50 == 49:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                sizes[row["index"] + 1] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

        batch.work(plan, Worker(plan, "w"), note)
    later = [size for count, size in sizes.items() if count >= 200]
    return {"mib_by_items": sizes, "growth_from_200_mib": later[-1] - later[0]}


def measure_unlike(options: argparse.Namespace) -> dict[str, Any]:
    """Two workers of unlike speed on one plan."""
    from batch_kill import plan_of

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_of(options.model, folder / "out", options.items, options.steps, "unlike")
        singles = tuple((item,) for batch in plan.batches for item in batch)
        file = folder / "plan.json"
        file.write_text(dataclasses.replace(plan, batches=singles).to_json(), encoding="utf-8")
        spin = [sys.executable, "-c", "while True: pass"]
        burners = [subprocess.Popen(["taskset", "-c", "1", *spin]) for _ in range(2)]
        try:
            me = [sys.executable, __file__, "worker", "-o", str(file), "--core"]
            workers = [subprocess.Popen([*me, str(core)], env=ENV) for core in (0, 1)]
            for worker in workers:
                worker.wait()
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()
        manifest = Manifest(folder / "out")
        manifest.refresh()
    names = {"core0": "fast", "core1": "slow"}
    seconds: dict[str, list[float]] = {name: [] for name in names.values()}
    for row in manifest.rows:
        seconds[names[row["worker"]]].append(round(row["seconds"], 4))
    ends = [row["finished"] for row in manifest.rows]
    starts = [row["finished"] - row["seconds"] for row in manifest.rows]
    rate = sum(1 / statistics.mean(each) for each in seconds.values())
    return {
        "seconds": seconds,
        "made": {name: len(each) for name, each in seconds.items()},
        "wall": max(ends) - min(starts),
        "bound": len(manifest.rows) / rate,
        "equal_halves": len(manifest.rows) / 2 * statistics.mean(seconds["slow"]),
    }


def work_on_core(options: argparse.Namespace) -> None:
    """One of the workers of `measure_unlike`."""
    os.sched_setaffinity(0, {options.core})
    from accel import batch
    from accel.batch_plan import Plan
    from accel.batch_worker import Worker

    plan = Plan.from_json(options.output.read_text(encoding="utf-8"))
    worker = Worker(plan, f"core{options.core}")
    ready = options.output.with_name(f"ready{options.core}")
    ready.touch()
    while len(list(ready.parent.glob("ready*"))) < 2:
        time.sleep(0.01)
    batch.work(plan, worker, lambda row: None)


def main() -> None:
    """Measure one thing and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["workers", "memory", "unlike", "worker"])
    parser.add_argument("--model", default="emoji-video")
    parser.add_argument("--items", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "worker":
        work_on_core(options)
        return
    items, steps = {"workers": (200, 20), "memory": (1000, 2), "unlike": (60, 20)}[options.what]
    options.items, options.steps = options.items or items, options.steps or steps
    os.environ |= {"OMP_NUM_THREADS": "1"}
    measure = {"workers": measure_workers, "memory": measure_memory, "unlike": measure_unlike}
    found = measure[options.what](options)

    from accel import generate

    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": generate.versions(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": os.getloadavg(),
        },
        "model": options.model,
        "items": options.items,
        "steps": options.steps,
        **found,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "pairs"}))


if __name__ == "__main__":
    main()

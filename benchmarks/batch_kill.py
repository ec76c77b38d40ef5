"""kill -9 a batch at random moments, resume it each time, and count what went wrong.

    python benchmarks/batch_kill.py --kills 50 -o benchmarks/results/batch-kill.json

Each round starts a process that works on one plan, as `accel batch` does, and kills it after a
random time (the process is forked, so that imports are not what is killed most). After each kill
every file under a final name is decoded and its hash and metadata are held against the manifest. At
the end the batch is resumed to its end and compared, byte for byte, with an uninterrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from accel import batch, batch_items, generate, media, model_zoo
from accel.batch_manifest import Manifest, sha256
from accel.batch_plan import Plan
from accel.batch_worker import Worker


def plan_of(model: str, folder: Path, count: int, steps: int, run: str) -> Plan:
    """`count` training prompts of a zoo model, two in a call."""
    source = str(model_zoo.prompts(model, "train"))
    items = batch_items.named(batch_items.read(source)[:count])
    job = generate.Job(model=f"zoo:{model}", prompt="", steps=steps)
    made = batch.batches(items, 2)
    return Plan(job, str(folder), first=items[0], batches=made, run=run)


def work(plan: Plan) -> None:
    """Carry a plan out in this process."""
    batch.work(plan, Worker(plan, f"pid{os.getpid()}"), lambda row: None)


def killed(plan: Plan, after: float) -> bool:
    """Whether a process that works on the plan was killed (it may end before)."""
    child = os.fork()
    if not child:
        try:
            work(plan)
        finally:
            os._exit(0)
    began = time.monotonic()
    while time.monotonic() - began < after:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def faults(folder: Path) -> Counter[str]:
    """Truncated files, and files that the manifest describes otherwise than they are."""
    found: Counter[str] = Counter()
    manifest = Manifest(folder)
    manifest.refresh()
    rows = {row["file"]: row for row in manifest.rows if row["status"] == "done"}
    for path in folder.glob("*.*"):
        if path.name.startswith(".") or path.suffix == ".jsonl":
            continue
        try:
            about = media.read_metadata(path)
            decode(path)
        except Exception:  # any error of a decoder means that the file is not whole
            found["truncated"] += 1
            continue
        row = rows.get(path.name)
        if row and (row["id"] != about["id"] or row["sha256"] != sha256(path)):
            found["not as the manifest says"] += 1
    return found


def decode(path: Path) -> None:
    """Read every pixel of a file."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            np.asarray(image)
        return
    import av

    with av.open(str(path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    if not frames:
        raise ValueError(f"{path}: no frame")


def one(model: str, kills: int, count: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """Kill, check and resume on one model."""
    root = Path(tempfile.mkdtemp(prefix="accel-kill-"))
    whole = plan_of(model, root / "whole", count, steps, "whole")
    began = time.monotonic()
    work(whole)
    seconds = time.monotonic() - began
    found: Counter[str] = Counter()
    done = restarts = folders = 0
    while done < kills:
        folder, complete = root / f"killed{folders}", False
        folders += 1
        while not complete and done < kills:
            plan = dataclasses.replace(whole, output=str(folder), run=f"r{restarts}")
            restarts += 1
            if killed(plan, rng.uniform(0.1 * seconds, 0.8 * seconds)):
                done += 1
            else:
                complete = True
            found += faults(folder)
        work(dataclasses.replace(whole, output=str(folder), run="last"))
        found += faults(folder)
        found += compared(folder, root / "whole")
    shutil.rmtree(root)
    return {
        "model": model,
        "kills": done,
        "starts": restarts,
        "batches": folders,
        "items": count,
    } | {"faults": dict(found)}


def compared(folder: Path, whole: Path) -> Counter[str]:
    """What differs between a resumed and an uninterrupted folder."""
    hashes = [
        {path.name: sha256(path) for path in each.iterdir() if path.suffix in (".png", ".mp4")}
        for each in (folder, whole)
    ]
    manifest = Manifest(folder)
    manifest.refresh()
    done = Counter(row["name"] for row in manifest.rows if row["status"] == "done")
    return Counter(
        {
            "missing": len(set(hashes[1]) - set(hashes[0])),
            "too many": len(set(hashes[0]) - set(hashes[1])),
            "other bytes": sum(
                hashes[0][name] != hashes[1][name] for name in set(hashes[0]) & set(hashes[1])
            ),
            "left-over parts": len(list(folder.glob(".*.part"))),
            "duplicate rows": sum(count - 1 for count in done.values()),
        }
    )


def main() -> None:
    """Run and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("accel").setLevel(logging.ERROR)
    rng, half = random.Random(options.seed), options.kills // 2
    counts = {"emoji-unet": half, "emoji-video": options.kills - half}
    rows = [one(model, kills, options.items, options.steps, rng) for model, kills in counts.items()]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "versions": generate.versions(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

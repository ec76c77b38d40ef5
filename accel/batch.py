"""Many prompts to files: on this device, on several through accelerate, on machines through Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from accel import placement
from accel.batch_items import Item
from accel.batch_manifest import PRIVATE, Manifest, claim
from accel.batch_plan import Plan
from accel.batch_worker import Worker
from accel.method import AccelError

logger = logging.getLogger(__name__)
POLL = 0.2
RESTARTS = 20
"""How often the launcher starts the workers of a machine again after one of them died."""
Emit = Callable[[dict[str, Any]], None]


class StoppedError(Exception):
    """An item failed and the plan says to stop there."""


def batches(items: Sequence[Item], size: int) -> tuple[tuple[Item, ...], ...]:
    """Items that share their arguments, `size` at a time.

    Made from all items before any are left out, so that what runs together, and with it the last
    bits of every file, does not depend on shards, workers or what is done already.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        key = json.dumps(item.call, sort_keys=True) if item.error is None else f"line {item.line}"
        groups.setdefault(key, []).append(item)
    found = [
        tuple(group[start : start + size])
        for group in groups.values()
        for start in range(0, len(group), size)
    ]
    return tuple(sorted(found, key=lambda batch: batch[0].index))


def shard(made: tuple[tuple[Item, ...], ...], text: str | None) -> tuple[tuple[Item, ...], ...]:
    """The batches of shard "i/n", i from 1 to n."""
    if text is None:
        return made
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise AccelError(f"--shard {text!r}: write i/n with i from 1 to n, such as 2/4")
    return made[int(first) - 1 :: int(count)]


def run(
    plan: Plan,
    emit: Emit,
    workers: int = 1,
    gpus: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Carry a plan out and return its summary.

    `emit` gets each row as it comes; several `workers` of accelerate print theirs as JSON lines.
    `gpus`: their numbers with commas, or None for all. `address`: of a Ray cluster.
    """
    began = time.time()
    deadline = None if plan.deadline is None else began + plan.deadline
    plan = dataclasses.replace(plan, run=uuid.uuid4().hex[:12], deadline=deadline)
    _check(plan)
    if address is not None:
        from accel import batch_ray

        with _stopping():
            batch_ray.work(plan, address, workers, emit)
    elif workers > 1 and "LOCAL_RANK" not in os.environ:
        _launch(plan, workers, gpus)
    else:
        plan = _join(plan, emit)
    return summary(plan, time.time() - began)


def summary(plan: Plan, seconds: float) -> dict[str, Any]:
    """Counts of a finished run, from the manifest."""
    manifest = Manifest(Path(plan.output))
    manifest.refresh()
    made = kept = failed = open_ = 0
    for item in (item for batch in plan.batches for item in batch):
        row = manifest.by_name.get(item.name or "")
        if row is None or (row.get("run") != plan.run and row["status"] != "done"):
            open_ += 1
        elif row.get("run") != plan.run:
            kept += 1
        elif row["status"] == "done":
            made += 1
        else:
            failed += 1
    return {
        "summary": True,
        "made": made,
        "kept": kept,
        "failed": failed,
        "not_begun": open_,
        "seconds": round(seconds, 3),
        "manifest": str(manifest.path),
    }


def work(plan: Plan, worker: Worker, emit: Emit) -> None:
    """Make everything in the plan that nobody else makes; returns when all is made."""
    manifest = Manifest(Path(plan.output))
    manifest.refresh()
    waiting = {
        number: wanted
        for number, batch in enumerate(plan.batches)
        if (wanted := worker.waiting(batch, manifest))
    }
    while waiting:
        manifest.refresh()
        waiting = {
            number: wanted
            for number, batch in waiting.items()
            if (wanted := [item for item in batch if not _handled(item, manifest, plan)])
        }
        if waiting and not _take(plan, worker, manifest, waiting, emit):
            time.sleep(POLL)


def _take(
    plan: Plan,
    worker: Worker,
    manifest: Manifest,
    waiting: dict[int, list[Item]],
    emit: Emit,
) -> bool:
    """Make the first batch that nobody works on; False when it is not for this worker to do so."""
    for number in waiting:
        batch = plan.batches[number]
        with claim(worker.folder, f"batch-{batch[0].index}") as mine:
            if not mine:
                continue
            manifest.refresh()
            wanted = [item for item in waiting[number] if not _handled(item, manifest, plan)]
            left = sum(len(items) for later, items in waiting.items() if later >= number)
            if not _my_turn(plan, worker, manifest, left):
                return False
            for row in worker.do(batch, wanted):
                manifest.append(row)
                emit(row)
                if row["status"] == "failed" and plan.on_error == "stop":
                    raise StoppedError(row["error"])
            return True
    return False


def _handled(item: Item, manifest: Manifest, plan: Plan) -> bool:
    return manifest.by_name.get(item.name or "", {}).get("run") == plan.run


def _my_turn(plan: Plan, worker: Worker, manifest: Manifest, left: int) -> bool:
    """Whether this worker takes one of the items left, by what the workers of this run measured."""
    finished: dict[str, list[tuple[float, float]]] = {}
    for row in manifest.rows[-1000:]:
        if row.get("run") == plan.run and row.get("seconds"):
            finished.setdefault(row["worker"], []).append((row["finished"], row["seconds"]))
    prices = {worker_name(number): price for number, price in enumerate(plan.prices)}
    devices, now = placement.known(finished, prices), time.time()
    if worker.name in devices:
        devices[worker.name] = dataclasses.replace(devices[worker.name], free=now)
    return len(devices) < 2 or placement.takes(worker.name, left, devices, now, plan.deadline)


def worker_name(number: int) -> str:
    """How worker `number` of this machine is called in the manifest."""
    import socket

    return f"{socket.gethostname()}/{number}"


def _check(plan: Plan) -> None:
    output = Path(plan.output)
    if output.exists() and not output.is_dir():
        raise AccelError(f"--output {output}: is not a folder")
    output.mkdir(parents=True, exist_ok=True)


def _join(plan: Plan, emit: Emit) -> Plan:
    """Work as one of accelerate's processes; alone when it started none. Returns the plan with the
    run's name that all processes share."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    gpu = plan.job.loading.device != "cpu" and torch.accelerator.is_available()
    state = PartialState(cpu=not gpu)
    try:
        if state.num_processes > 1:
            plan = dataclasses.replace(plan, run=broadcast_object_list([plan.run])[0])
        worker = Worker(plan, worker_name(state.process_index), str(state.device))
        with _stopping():
            work(plan, worker, emit)
        state.wait_for_everyone()
        return plan
    finally:
        state.destroy_process_group()


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """A stop that the plan asked for ends the work and is said."""
    try:
        yield
    except StoppedError as stop:
        logger.error("stopped: %s", stop)


def _launch(plan: Plan, workers: int, gpus: str | None) -> None:
    """Let accelerate's launcher start the workers; a run goes on when one of them dies."""
    folder = Path(plan.output) / PRIVATE
    folder.mkdir(exist_ok=True)
    file = folder / f"plan-{plan.run}.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", str(workers), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--max_restarts", str(RESTARTS), "--main_process_port", "0"),
        *("--gpu_ids", gpus or "all", "-m", "accel.batch", str(file)),
    ]
    process = subprocess.Popen(command)
    try:
        if process.wait():
            logger.error("the launcher ended with exit code %d", process.returncode)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    finally:
        file.unlink(missing_ok=True)


def emit_line(row: dict[str, Any]) -> None:
    """A row as one JSON line on standard output, in one write: several processes share it."""
    sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def main() -> None:
    """`python -m accel.batch PLAN`: one of accelerate's processes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _join(Plan.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")), emit_line)


if __name__ == "__main__":
    main()

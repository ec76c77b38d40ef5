"""`accel batch`: from command-line options to a plan, its progress and its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel import batch_items
from accel.batch_items import Item
from accel.method import AccelError

_LOADING = (
    *("dtype", "device", "variant", "revision", "cpu_offload", "attention_backend", "vae_tiling"),
)
_JOB = (
    *("model", "negative_prompt", "steps", "guidance_scale", "height", "width", "num_frames"),
    *("fps", "video_format"),
)
Say = Callable[[str], None]


def run(options: dict[str, Any], as_json: bool, say: Say) -> int:
    """Do what the options ask; returns the exit code: 0, or 1 when items failed.

    Standard output gets a line for each file (JSON with `as_json` or several workers) and a
    summary, `say` the progress.
    """
    items = _items(options)
    if options["dry_run"]:
        for item in items:
            _print(item.to_dict(), as_json)
        return int(any(item.error for item in items))
    from accel import batch

    plan, workers, gpus = _plan(options, items), *_workers(options)
    total = sum(map(len, plan.batches))
    say(f"{total} items to {plan.output}")

    def emit(row: dict[str, Any]) -> None:
        _print(row, as_json)
        if row["status"] == "failed":
            say(f"item {row['index']}: {row['error']}")

    try:
        summary = batch.run(plan, emit, workers, gpus, options["ray"])
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it stopped")
        raise
    _print(summary, as_json)
    return int(summary["failed"] + summary["not_begun"] > 0)


def _items(options: dict[str, Any]) -> list[Item]:
    seeds = batch_items.seed_list(options["seeds"]) if options["seeds"] else ()
    items = batch_items.read(options["prompts"], seeds, options["seed"])
    named = batch_items.named(items, options["name_template"], options["vbench_names"])
    return named[: options["limit"]]


def _plan(options: dict[str, Any], items: list[Item]) -> Any:
    """The plan of this shard."""
    from accel import batch, generate, media
    from accel.batch_plan import Plan
    from accel.loading import Loading

    if options["video_format"] not in media.VIDEO_FORMATS:
        accepted = ", ".join(media.VIDEO_FORMATS)
        raise AccelError(f"--video-format {options['video_format']!r}; accepted: {accepted}")
    first = next((item for item in items if item.error is None), None)
    if first is None:
        raise AccelError(f"prompts {options['prompts']}: no usable line ({items[0].error})")
    loading = Loading(
        **{name: options[name] for name in _LOADING},
        lora=tuple(options["lora"] or ()),
        compile=options["compile_blocks"],
    )
    job = {name: options[name] for name in _JOB} | {"extra": options["pipeline_kwargs"]}
    asked = generate.asked(options["method"] or [], options["settings"], options["recipe"])
    return Plan(
        job=generate.Job(prompt="", loading=loading, **job),
        output=str(Path(options["output"]).absolute()),
        recipe=asked.model_dump(mode="json") if asked else {},
        first=first,
        batches=batch.shard(batch.batches(items, options["batch_size"]), options["shard"]),
        overwrite=not options["resume"],
        retry=options["retry"],
        on_error=options["on_error"],
        oom_fallback=options["oom_fallback"],
        deadline=options["deadline"],
        prices=_prices(options["prices"]),
    )


def _workers(options: dict[str, Any]) -> tuple[int, str | None]:
    """How many workers, and on which GPUs (None: all)."""
    gpus = options["gpus"]
    if gpus is None:
        return options["workers"], None
    if options["ray"] is not None:
        raise AccelError("--gpus is for this machine; Ray gives one GPU to each of its --workers")
    if gpus == "all":
        import torch

        count = torch.cuda.device_count()
        if not count:
            raise AccelError("--gpus all: this machine has none; use --workers N for CPU processes")
        return count, None
    if not all(part.isdecimal() for part in gpus.split(",")):
        raise AccelError(f"--gpus {gpus!r}: write all, or numbers with commas such as 0,1")
    return len(gpus.split(",")), gpus


def _prices(text: str | None) -> tuple[float, ...]:
    try:
        prices = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        prices = (-1.0,)
    if not all(0 < price < float("inf") for price in prices):
        raise AccelError(f"--prices {text!r}: write positive numbers with commas, one a worker")
    return prices


def _print(row: dict[str, Any], as_json: bool) -> None:
    """A row as one line: JSON, or what a reader wants to know."""
    if as_json:
        text = json.dumps(row, ensure_ascii=False)
    elif row.get("summary"):
        counts = ("made", "kept", "failed", "not_begun")
        text = ", ".join(f"{row[key]} {key.replace('_', ' ')}" for key in counts)
        text += f" in {row['seconds']:.1f} s; {row['manifest']}"
    else:
        about = row.get("error") or row.get("file") or row["prompt"]
        text = f"{row['index']:>5}  {row['name']}  seed {row['seed']}  {about}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

"""Make a file again from its own metadata, and say whether it came back bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import accel
from accel import generate, media
from accel.batch_checks import LADDER
from accel.loading import Loading
from accel.method import AccelError
from accel.recipe import Recipe

logger = logging.getLogger(__name__)


def rerun(file: Path, output: Path | None = None) -> dict[str, Any]:
    """Write `file` again as `output` (by default beside it, "-rerun" in its name) and compare.

    Uses the recorded model, arguments, recipe and number of CPU threads, the other prompts of its
    batch, and what the out-of-memory ladder had changed. Other versions or devices may give other
    bits; versions that differ are logged.
    """
    about = media.read_metadata(file)
    if about.get("schema_version") != 1 or "fps" not in about:
        raise AccelError(f"{file}: its metadata is of another version of accel; cannot be rerun")
    target = output or file.with_name(f"{file.stem}-rerun{file.suffix}")
    if target.suffix != file.suffix:
        raise AccelError(f"--output {target}: must end in {file.suffix}, as {file.name} does")
    _warn_of_versions(about["versions"])
    with _threads(about["threads"]):
        array = _array(about)
    video_format = file.suffix.removeprefix(".")
    path = media.save(
        target.with_suffix(""), generate.pixels(array), about["fps"], video_format, about
    )
    return {"file": str(path), "identical": path.read_bytes() == file.read_bytes()}


def _array(about: dict[str, Any]) -> Any:
    """The pixels of a file, 0 to 1."""
    options = about["loading"]
    job = generate.Job(
        model=about["model"],
        prompt=about["prompt"],
        extra=about["call"],
        loading=Loading(**options | {"lora": tuple(options["lora"])}),
    )
    pipe, call, _ = generate.load(job)
    for rung in about.get("fallback", ()):
        LADDER[rung](pipe)
    together = about.get("batch") or [{"prompt": about["prompt"], "seed": about["seed"]}]
    if len(together) > 1:
        call["prompt"] = [each["prompt"] for each in together]
        negatives = [each["negative_prompt"] for each in together]
        if any(negative is not None for negative in negatives):
            call["negative_prompt"] = [negative or "" for negative in negatives]
    with contextlib.ExitStack() as stack:
        if about["recipe"] is not None:
            stack.enter_context(accel.patched(pipe, recipe=Recipe.read(about["recipe"])))
        arrays, _ = generate.render(pipe, call, [each["seed"] for each in together])
    return arrays[about.get("place", 0)]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warn_of_versions(made: dict[str, str]) -> None:
    now = generate.versions()
    for name in sorted(set(made) & set(now)):
        if made[name] != now[name]:
            logger.warning("made with %s %s, here is %s", name, made[name], now[name])

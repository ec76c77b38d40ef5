"""One prompt to a picture or video, patched, and if wished compared with the untouched pipeline."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import accel
from accel import loading, media, metrics, registry
from accel.loading import Loading
from accel.method import AccelError
from accel.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from accel.report import Report

logger = logging.getLogger(__name__)
REPEATS = 3


@dataclass(frozen=True)
class Job:
    """What to make. None leaves the choice to the model."""

    model: str
    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    video_format: str = "mp4"
    extra: dict[str, Any] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)


@dataclass(frozen=True)
class Comparison:
    """Patched against untouched, one seed. `speedup` is the median of alternating pairs."""

    speedup: float
    speedups: tuple[float, ...]
    seconds: float
    untouched_seconds: float
    psnr: float
    ssim_gaussian11: float
    feature_distance: float | None


def load(job: Job) -> tuple[Any, dict[str, Any], int]:
    """Pipeline, arguments of its call, and frames per second for video."""
    pipe, call, fps = loading.load(job.model, job.loading)
    return pipe, arguments(pipe, call, job), job.fps or fps or 16


def arguments(pipe: Any, call: dict[str, Any], job: Job) -> dict[str, Any]:
    """The arguments of a call: those that the model was made for, with what the job asks for."""
    chosen = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "num_inference_steps": job.steps,
        "height": job.height,
        "width": job.width,
        "num_frames": job.num_frames,
        **job.extra,
    }
    accepted = set(inspect.signature(pipe.__call__).parameters)
    scale = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    chosen[scale] = job.guidance_scale
    call = call | {name: value for name, value in chosen.items() if value is not None}
    unknown = sorted(set(call) - accepted)
    if unknown:
        raise AccelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    return call


def methods(names: list[str], settings: dict[str, Any], recipe: Path | None) -> tuple[Any, ...]:
    """The methods asked for by name or recipe; empty for the best known recipe."""
    if names and recipe is not None:
        raise AccelError("give --method or --recipe, not both")
    if recipe is not None:
        return Recipe.read(str(recipe)).methods
    if settings and len(names) != 1:
        raise AccelError("--set needs exactly one --method")
    entries = [{"name": name, "settings": settings} for name in names]
    for name in names:
        registry.method(name)
    return Recipe.read({"entries": entries}).methods if entries else ()


def make(pipe: Any, call: dict[str, Any], seed: int) -> tuple[NDArray[np.uint8], float]:
    """Run once: a picture (h, w, 3) or video (frames, h, w, 3), and the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    out = pipe(**call, generator=generator, output_type="np")
    seconds = time.perf_counter() - began
    array = np.asarray(out.frames[0] if hasattr(out, "frames") else out.images[0])
    if not np.isfinite(array).all():
        raise AccelError("the pipeline produced values that are not finite")
    return (array * 255).round().clip(0, 255).astype(np.uint8), seconds


def compare(
    run: Callable[[], tuple[NDArray[np.uint8], float]],
    untouched: Callable[[], tuple[NDArray[np.uint8], float]],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Comparison]:
    """Alternate both `REPEATS` times after one warm-up of each, and measure the difference."""
    fast, slow = run()[0], untouched()[0]
    pairs = [(run()[1], untouched()[1]) for _ in range(REPEATS)]
    ratios = tuple(plain / patched for patched, plain in pairs)
    psnr, ssim, distance = quality(fast, slow)
    return (
        fast,
        slow,
        Comparison(
            speedup=statistics.median(ratios),
            speedups=ratios,
            seconds=statistics.median(patched for patched, _ in pairs),
            untouched_seconds=statistics.median(plain for _, plain in pairs),
            psnr=psnr,
            ssim_gaussian11=ssim,
            feature_distance=distance,
        ),
    )


def quality(fast: NDArray[np.uint8], slow: NDArray[np.uint8]) -> tuple[float, float, float | None]:
    """PSNR, SSIM and feature distance (None without its extra) of two pictures or videos."""
    a, b = (
        torch.from_numpy(x).reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2) / 255
        for x in (fast, slow)
    )
    try:
        distance = metrics.feature_distance(a, b)
    except AccelError as error:
        logger.warning("%s", error)
        distance = None
    return metrics.psnr(a, b), metrics.ssim(a, b), distance


def generate(
    job: Job, chosen: tuple[Any, ...], output: Path, against_untouched: bool
) -> dict[str, Any]:
    """Do a job and write its files; returns what the command line prints."""
    if job.video_format not in media.VIDEO_FORMATS:
        accepted = ", ".join(media.VIDEO_FORMATS)
        raise AccelError(f"unknown video format {job.video_format!r}; accepted: {accepted}")
    pipe, call, fps = load(job)
    settled, recipe = settle(pipe, chosen, lambda: make(pipe, call, job.seed))
    reports: list[Report] = []

    def run() -> tuple[NDArray[np.uint8], float]:
        with accel.patched(pipe, *settled) as handle:
            result = make(pipe, call, job.seed)
            reports[:] = [handle.report()]
        return result

    comparison, slow = None, None
    if against_untouched:
        fast, slow, comparison = compare(run, lambda: make(pipe, call, job.seed))
    else:
        fast = run()[0]
    metadata = _metadata(job, call, recipe)
    files = _write(output, job, fast, slow, fps, metadata)
    return _result(files, reports[0], comparison, metadata)


def settle(
    pipe: Any, chosen: tuple[Any, ...], run: Callable[[], Any]
) -> tuple[tuple[Any, ...], Recipe]:
    """The methods with their tables; `run` is called once when one still has to be measured."""
    with accel.patched(pipe, *chosen) as attached:
        if any(getattr(method, "unmeasured", False) for method in attached.methods):
            logger.info("no table is known for this model: measuring in one full run")
            run()
        return attached.methods, attached.recipe()


def _metadata(job: Job, call: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")
    }
    return {
        "schema_version": 1,
        "model": job.model,
        "prompt": job.prompt,
        "seed": job.seed,
        "steps": call.get("num_inference_steps"),
        "loading": dataclasses.asdict(job.loading),
        "call": {key: value for key, value in call.items() if key != "prompt"},
        "methods": [entry.name for entry in recipe.entries],
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"accel": accel.__version__, **versions},
    }


def _write(
    output: Path, job: Job, fast: Any, slow: Any, fps: int, metadata: dict[str, Any]
) -> list[str]:
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in job.prompt.lower())
    stem = f"{'-'.join(part for part in words.split('-') if part)[:60]}_{job.seed}"
    versions = {stem: (fast, metadata)}
    if slow is not None:
        plain = {**metadata, "methods": [], "recipe": None}
        zoom = max(256 // fast.shape[-2], 1)
        versions[f"{stem}_untouched"] = (slow, plain)
        versions[f"{stem}_side-by-side"] = (media.side_by_side(fast, slow, zoom), metadata)
    files = []
    for name, (array, about) in versions.items():
        if array.ndim == 4:
            path = output / f"{name}.{job.video_format}"
            files.append(media.save_video(path, array, fps, about))
        else:
            files.append(media.save_image(output / f"{name}.png", array, about))
    return [str(file) for file in files]


def _result(
    files: list[str], report: Report, comparison: Comparison | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"methods": metadata["methods"]}
    if comparison is not None:
        result |= {
            "speedup": comparison.speedup,
            "speedups": list(comparison.speedups),
            "seconds": comparison.seconds,
            "untouched_seconds": comparison.untouched_seconds,
            "psnr": comparison.psnr,
            "ssim_gaussian11": comparison.ssim_gaussian11,
            "feature_distance": comparison.feature_distance,
        }
    return result | {
        "share_computed": report.share_computed,
        "hits": sum(row.verdict != "computed" for row in report.rows),
        "calls": len(report.rows),
        "memory_bytes": report.memory_bytes,
        "verdicts": report.verdicts,
        "files": files,
    }

"""One prompt to a picture or video, patched, and if wished compared with the untouched pipeline."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import accel
from accel import loading, media, metrics, registry
from accel.batch_items import slug
from accel.loading import Loading
from accel.method import AccelError
from accel.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from accel.report import Report

logger = logging.getLogger(__name__)
REPEATS = 3
OURS = {"output_type", "generator", "return_dict", "latents", "callback", "callback_steps"} | {
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs")
}
"""Arguments of a call that make and watch a result."""


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
        "guidance_scale": job.guidance_scale,
        "height": job.height,
        "width": job.width,
        "num_frames": job.num_frames,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return completed(pipe, call, job.extra | given)


def completed(pipe: Any, call: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments `call` with those `given`; raises `AccelError` for what the pipeline lacks."""
    if "guidance_scale" in given and "true_cfg_scale" in call:
        rest = {name: value for name, value in given.items() if name != "guidance_scale"}
        given = rest | {"true_cfg_scale": given["guidance_scale"]}
    ours = sorted(OURS & set(given))
    if ours:
        raise AccelError(f"{', '.join(ours)}: set by accel itself and cannot be given")
    unknown = sorted(set(call | given) - set(inspect.signature(pipe.__call__).parameters))
    if unknown:
        raise AccelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if given.get(name, 1) != 1:
            raise AccelError(f"{name}={given[name]!r}: one result a prompt is made; use more seeds")
    return call | given


def asked(names: list[str], settings: dict[str, Any], recipe: Path | None) -> Recipe | None:
    """The recipe of methods asked for by name, or the one of a file; None: the best known one."""
    if names and recipe is not None:
        raise AccelError("give --method or --recipe, not both")
    if recipe is not None:
        return Recipe.read(str(recipe))
    if settings and len(names) != 1:
        raise AccelError("--set needs exactly one --method")
    entries = [{"name": name, "settings": settings} for name in names]
    for name in names:
        registry.method(name)
    return Recipe.read({"entries": entries}) if entries else None


def render(
    pipe: Any, call: dict[str, Any], seeds: Sequence[int]
) -> tuple[list[NDArray[np.float32]], float]:
    """One call: a picture (h, w, 3) or video (frames, h, w, 3) for each seed, and its seconds.

    Values are 0 to 1 unless the model went wrong. Generators are on the CPU, so that noise depends
    on the seed alone and not on the device or the batch. Raises `AccelError` for another number of
    results than of seeds.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    began = time.perf_counter()
    out = pipe(**call, generator=generators if len(seeds) > 1 else generators[0], output_type="np")
    seconds = time.perf_counter() - began
    made = out.frames if hasattr(out, "frames") else out.images
    if len(made) != len(seeds):
        raise AccelError(
            f"{type(pipe).__name__} made {len(made)} results of {len(seeds)} prompts; "
            + ("use --batch-size 1" if len(seeds) > 1 else "its arguments must ask for one")
        )
    return [np.asarray(each) for each in made], seconds


def pixels(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values 0 to 1 as bytes."""
    return (array * 255).round().clip(0, 255).astype(np.uint8)


def make(pipe: Any, call: dict[str, Any], seed: int) -> tuple[NDArray[np.uint8], float]:
    """Run once: a picture (h, w, 3) or video (frames, h, w, 3), and the seconds it took."""
    (array,), seconds = render(pipe, call, [seed])
    if not np.isfinite(array).all():
        raise AccelError("the pipeline produced values that are not finite")
    return pixels(array), seconds


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
    job: Job, chosen: Recipe | None, output: Path, against_untouched: bool
) -> dict[str, Any]:
    """Do a job and write its files; returns what the command line prints."""
    if job.video_format not in media.VIDEO_FORMATS:
        accepted = ", ".join(media.VIDEO_FORMATS)
        raise AccelError(f"unknown video format {job.video_format!r}; accepted: {accepted}")
    pipe, call, fps = load(job)
    recipe = settle(pipe, chosen, lambda: make(pipe, call, job.seed))
    reports: list[Report] = []

    def run() -> tuple[NDArray[np.uint8], float]:
        with accel.patched(pipe, recipe=recipe) as handle:
            result = make(pipe, call, job.seed)
            reports[:] = [handle.report()]
        return result

    comparison, slow = None, None
    if against_untouched:
        fast, slow, comparison = compare(run, lambda: make(pipe, call, job.seed))
    else:
        fast = run()[0]
    about = metadata(job, call, recipe, fps, reports[0].methods)
    files = _write(output, job, fast, slow, fps, about)
    return _result(files, reports[0], comparison, about)


def settle(pipe: Any, chosen: Recipe | None, run: Callable[[], Any]) -> Recipe:
    """A recipe (None: the best known one) with its tables and where it holds.

    `run` is called once when a method still has to be measured.
    """
    with accel.patched(pipe, recipe=chosen) as attached:
        if any(getattr(method, "unmeasured", False) for method in attached.methods):
            logger.info("no table is known for this model: measuring in one full run")
            run()
        return attached.recipe()


def metadata(
    job: Job, call: dict[str, Any], recipe: Recipe | None, fps: int, used: Sequence[str]
) -> dict[str, Any]:
    """Everything that makes the file again; without a recipe it was made untouched.

    `used`: the methods that really ran, others than the recipe's where that does not hold.
    """
    return {
        "schema_version": 1,
        "model": job.model,
        "prompt": job.prompt,
        "seed": job.seed,
        "steps": call.get("num_inference_steps"),
        "loading": dataclasses.asdict(job.loading),
        "call": {key: value for key, value in call.items() if key != "prompt"},
        "methods": list(used),
        "recipe": recipe.model_dump(mode="json") if recipe else None,
        "fps": fps,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package and those that make the numbers."""
    others = ("torch", "diffusers", "transformers")
    return {
        "accel": accel.__version__,
        **{name: importlib.metadata.version(name) for name in others},
    }


def _write(
    output: Path, job: Job, fast: Any, slow: Any, fps: int, about: dict[str, Any]
) -> list[str]:
    stem = f"{slug(job.prompt)}_{job.seed}"
    files = {stem: (fast, about)}
    if slow is not None:
        plain = {**about, "methods": [], "recipe": None}
        zoom = max(256 // fast.shape[-2], 1)
        files[f"{stem}_untouched"] = (slow, plain)
        files[f"{stem}_side-by-side"] = (media.side_by_side(fast, slow, zoom), about)
    return [
        str(media.save(output / name, array, fps, job.video_format, content))
        for name, (array, content) in files.items()
    ]


def _result(
    files: list[str], report: Report, comparison: Comparison | None, about: dict[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"methods": about["methods"]}
    if comparison is not None:
        result |= {
            "speedup": comparison.speedup,
            "speedups": list(comparison.speedups),
            "seconds": comparison.seconds,
            "untouched_seconds": comparison.untouched_seconds,
            "psnr": min(comparison.psnr, 100.0),
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

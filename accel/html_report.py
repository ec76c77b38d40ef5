"""`accel report`: what a choice of methods computes, saves and costs, as one HTML file.

The file needs nothing else: plots are inline SVG, pictures are embedded, no script is fetched.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import accel
from accel import generate, metrics
from accel.bench import pictures
from accel.method import AccelError
from accel.recipe import Recipe
from accel.svg import heat_map, lines, scatter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from accel.report import Report

FRAMES = 9
"""The most frames of a video that are embedded."""
REPEATS = 3
"""Timing pairs a prompt."""


@dataclass(frozen=True)
class Run:
    """One prompt, patched against untouched with the same seed."""

    prompt: str
    seed: int
    fast: NDArray[np.uint8]
    slow: NDArray[np.uint8]
    seconds: tuple[float, float]
    """Patched and untouched, medians."""
    error: list[float]
    """Relative difference of the latents after each step; empty where no callback tells them."""
    report: Report
    quality: dict[str, float]


def measure(pipe: Any, call: dict[str, Any], prompts: Sequence[str], recipe: Recipe) -> list[Run]:
    """Run every prompt patched and untouched; seed = its place in the list."""
    return [
        _measure_one(pipe, call | {"prompt": prompt}, seed, recipe)
        for seed, prompt in enumerate(prompts)
    ]


def _measure_one(pipe: Any, call: dict[str, Any], seed: int, recipe: Recipe) -> Run:
    slow_latents: list[torch.Tensor] = []
    fast_latents: list[torch.Tensor] = []
    slow = generate.make(pipe, _watched(pipe, call, slow_latents), seed)[0]
    with accel.patched(pipe, recipe=recipe) as handle:
        fast = generate.make(pipe, _watched(pipe, call, fast_latents), seed)[0]
        report = handle.report()
    seconds = []
    for _ in range(REPEATS):
        plain = generate.make(pipe, call, seed)[1]
        with accel.patched(pipe, recipe=recipe):
            seconds.append((generate.make(pipe, call, seed)[1], plain))
    a, b = pictures(fast), pictures(slow)
    quality = {"psnr": min(metrics.psnr(a, b), 100.0), "ssim_gaussian11": metrics.ssim(a, b)}
    fast_seconds, slow_seconds = np.median(seconds, axis=0)
    return Run(
        prompt=str(call["prompt"]),
        seed=seed,
        fast=fast,
        slow=slow,
        seconds=(float(fast_seconds), float(slow_seconds)),
        error=[_difference(x, y) for x, y in zip(fast_latents, slow_latents, strict=False)],
        report=report,
        quality=quality,
    )


def _watched(pipe: Any, call: dict[str, Any], latents: list[torch.Tensor]) -> dict[str, Any]:
    """The call with a callback that keeps the latents of every step, where the pipeline has one."""
    if "latents" not in getattr(pipe, "_callback_tensor_inputs", []):
        return call

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].float().cpu())
        return {}

    return call | {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["latents"]}


def _difference(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).norm() / (old.norm() + 1e-8))


def write(
    output: Path,
    title: str,
    recipe: Recipe,
    runs: Sequence[Run],
    bench_files: Sequence[Path] = (),
    command: str = "",
) -> Path:
    """Write the page in one piece and return its path."""
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(
        (Path(__file__).parent / "report_page.html.j2").read_text(encoding="utf-8")
    )
    rows = [row for file in bench_files for row in _bench_rows(file)]
    page = template.render(
        title=title,
        methods=[f"{entry.name} {json.dumps(_short(entry.settings))}" for entry in recipe.entries],
        figures=_figures(runs),
        pareto=scatter(_points(recipe, runs, rows), "speed-up", "PSNR, dB"),
        errors=lines(
            {f"{run.seed}: {run.prompt}": run.error for run in runs if run.error},
            "step",
            "relative difference of the latents",
        ),
        heat=heat_map(_shares(runs[0].report)),
        heat_prompt=runs[0].prompt,
        runs=[_embedded(run) for run in runs],
        measured=[json.dumps(row) for row in recipe.measured],
        command=command,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        versions=", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers")
        ),
    )
    part = output.with_name(output.name + ".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(page, encoding="utf-8")
    part.replace(output)
    return output


def _figures(runs: Sequence[Run]) -> dict[str, str]:
    ratios = [run.seconds[1] / run.seconds[0] for run in runs]
    decibels = [run.quality["psnr"] for run in runs]
    return {
        "speed-up": f"{np.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})",
        "PSNR": f"{np.median(decibels):.1f} dB (worst {min(decibels):.1f})",
        "SSIM": f"{np.median([run.quality['ssim_gaussian11'] for run in runs]):.3f}",
        "computed": f"{np.mean([run.report.share_computed for run in runs]):.0%}",
        "memory held": f"{max(run.report.memory_bytes for run in runs) / 2**20:.1f} MiB",
        "prompts": str(len(runs)),
    }


def _points(
    recipe: Recipe, runs: Sequence[Run], rows: Sequence[dict[str, Any]]
) -> dict[str, list[tuple[float, float, str]]]:
    """Points (speed-up, PSNR, name) of the scatter plot by kind."""
    here = [(run.seconds[1] / run.seconds[0], run.quality["psnr"], run.prompt) for run in runs]
    found = {
        "bench, ours": [_row_point(row) for row in rows if row["kind"] == "accel"],
        "bench, others": [_row_point(row) for row in rows if row["kind"] != "accel"],
        "calibrated front": [
            (each.speedup, each.psnr, " + ".join(entry.name for entry in each.entries))
            for each in recipe.front
        ],
        "these prompts": here,
    }
    return {kind: points for kind, points in found.items() if points}


def _row_point(row: dict[str, Any]) -> tuple[float, float, str]:
    return row["speedup"], row["psnr"]["median"], row["name"]


def _bench_rows(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        kept = [row for row in rows if "failed" not in row]
        if not all(row["kind"] and np.isfinite(_row_point(row)[:2]).all() for row in kept):
            raise ValueError("a row without finite figures")
        return kept
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise AccelError(f"{file}: not a result of accel bench ({error})") from error


def _shares(report: Report) -> dict[str, list[float]]:
    """Share of each call that was computed, by denoiser and branch."""
    found: dict[str, list[float]] = {}
    for row in report.rows:
        key = f"{row.denoiser}/{row.branch}"
        found.setdefault(key, []).append(row.blocks_run / max(row.blocks, 1))
    return found


def _embedded(run: Run) -> dict[str, Any]:
    fast, slow = (_frames(array) for array in (run.fast, run.slow))
    return {
        "prompt": run.prompt,
        "seed": run.seed,
        "psnr": f"{run.quality['psnr']:.1f}",
        "speedup": f"{run.seconds[1] / run.seconds[0]:.2f}",
        "fast": fast,
        "slow": slow,
        "width": max(run.fast.shape[-2], 192),
    }


def _frames(array: NDArray[np.uint8]) -> list[str]:
    """PNG data addresses of a picture, or of evenly spaced frames of a video."""
    whole = array.reshape(-1, *array.shape[-3:])
    chosen = np.linspace(0, len(whole) - 1, min(FRAMES, len(whole))).round().astype(int)
    return [_data(whole[index]) for index in chosen]


def _data(picture: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _short(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without long measured tables."""
    return {
        name: value if len(json.dumps(value)) < 60 else "(measured table)"
        for name, value in settings.items()
    }

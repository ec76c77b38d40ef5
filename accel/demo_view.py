"""What the demo shows of a run, as HTML and pictures: progress, heat map of steps, figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from accel import media
from accel.demo_engine import Outcome, Progress
from accel.report import StepRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

SHOWN = 512
"""Pixels of a picture's longer side on the page; smaller ones are enlarged by a whole number."""
_COLOURS = {
    "computed": "#4f46e5",
    "reused": "#f59e0b",
    "extrapolated": "#10b981",
    "left out": "#9ca3af",
}
_MEANING = {
    "computed": "computed",
    "reused": "reused: nothing new was computed",
    "extrapolated": "forecast from earlier steps",
    "left out": "guidance branch left out",
}
_CELL, _GAP, _LABEL = 14, 2, 132


# --- progress ------------------------------------------------------------------------------------


def progress(at: Progress) -> str:
    """A bar and what is going on."""
    share = at.step / at.total if at.total else 0.0
    where = f" · step {at.step} of {at.total}" if at.total else ""
    return (
        f'<div class="accel-status">{html.escape(at.stage)}{where}'
        f'<div class="accel-bar"><i style="width:{share:.0%}"></i></div></div>'
    )


def message(text: str) -> str:
    """One line in the place of the bar."""
    return f'<div class="accel-status">{html.escape(text)}</div>'


# --- the heat map --------------------------------------------------------------------------------


def heat_map(rows: Sequence[StepRow], total: int) -> str:
    """An SVG: one line for each denoiser and branch, one cell a step; cells fill as steps end."""
    lines: dict[str, dict[int, StepRow]] = {}
    for row in rows:
        lines.setdefault(f"{row.denoiser} · {row.branch}", {})[row.step] = row
    total = max([total, *(row.step + 1 for row in rows)])
    parts = [_line(index, name, cells, total) for index, (name, cells) in enumerate(lines.items())]
    width = _LABEL + total * (_CELL + _GAP)
    height = max(len(lines), 1) * (2 * _CELL)
    return (
        '<div class="accel-heat"><div class="accel-scroll">'
        f'<svg viewBox="0 0 {width} {height}" style="width:100%;max-width:{width}px;'
        f'min-width:{min(width, 640)}px" role="img" aria-label="work of each step">'
        f"{''.join(parts)}</svg></div>{_legend({row.verdict for row in rows})}</div>"
    )


def _line(index: int, name: str, cells: dict[int, StepRow], total: int) -> str:
    top = index * 2 * _CELL + _CELL // 2
    label = (
        f'<text x="0" y="{top + 11}" font-size="12" fill="currentColor">{html.escape(name)}</text>'
    )
    return label + "".join(_cell(step, top, cells.get(step)) for step in range(total))


def _cell(step: int, top: int, row: StepRow | None) -> str:
    x = _LABEL + step * (_CELL + _GAP)
    if row is None:
        return _rect(x, top, _CELL, 'fill="none" stroke="currentColor" stroke-opacity=".25"')
    share = min(row.blocks_run / row.blocks, 1.0)
    done = round(_CELL * share, 1)
    saved = _COLOURS["reused" if row.verdict == "computed" else row.verdict]
    told = f"step {row.step + 1}: {row.verdict}, {share:.0%} of the work, {row.seconds:.3f} s"
    upper = _rect(x, top, _CELL, f'fill="{saved}" fill-opacity=".55"') if done < _CELL else ""
    lower = _rect(x, top + _CELL - done, done, f'fill="{_COLOURS["computed"]}"') if done else ""
    return f"<g><title>{told}</title>{upper}{lower}</g>"


def _rect(x: float, y: float, height: float, paint: str) -> str:
    return f'<rect x="{x}" y="{y:g}" width="{_CELL}" height="{height:g}" rx="3" {paint}/>'


def _legend(verdicts: set[str]) -> str:
    items = "".join(
        f'<span><i style="background:{_COLOURS[verdict]}"></i>{_MEANING[verdict]}</span>'
        for verdict in _COLOURS
        if verdict in verdicts
    )
    return f'<div class="accel-legend">{items}</div>'


# --- the figures ---------------------------------------------------------------------------------


def figures(outcome: Outcome) -> str:
    """Tiles: speed-up, seconds, work and quality, as measured in this one run."""
    report = outcome.report
    tiles = []
    if outcome.speedup is not None and outcome.psnr is not None:
        tiles += [
            ("speed-up", f"{outcome.speedup:.2f}×", "one pair of runs, whole pipeline"),
            ("PSNR", _decibel(outcome.psnr), "against the untouched result"),
            ("SSIM", f"{outcome.ssim:.3f}", "1 is equal"),
        ]
        if outcome.feature_distance is not None:
            tiles += [("feature distance", f"{outcome.feature_distance:.3f}", "0 is equal")]
    untouched = outcome.untouched_seconds
    beside = f"untouched {untouched:.2f} s" if untouched is not None else "whole pipeline"
    tiles += [("seconds", f"{outcome.seconds:.2f}", beside)]
    if report.rows:
        tiles += [
            ("work done", f"{report.share_computed:.0%}", "share of the blocks executed"),
            ("cache memory", f"{report.memory_bytes / 2**20:.1f} MiB", "most held at once"),
        ]
    warning = ""
    if report.rows and report.hit_rate == 0:
        warning = '<p class="accel-warning">Nothing was skipped: these settings save no time.</p>'
    return cards(tiles) + warning


def cards(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Tiles of (name, value, note)."""
    shown = "".join(
        f'<div class="accel-tile"><small>{name}</small><b>{value}</b><span>{note}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="accel-tiles">{shown}</div>'


def _decibel(psnr: float) -> str:
    return "equal" if psnr == float("inf") else f"{psnr:.1f} dB"


def caption(outcome: Outcome) -> str:
    """One line for the history."""
    names = " + ".join(outcome.report.methods) or "untouched"
    speed = f" · {outcome.speedup:.2f}×" if outcome.speedup is not None else ""
    return f"{outcome.wish.job.prompt[:40]} · {names}{speed}"


# --- pictures ------------------------------------------------------------------------------------


def enlarge(picture: Frames) -> Frames:
    """A picture (h, w, 3) whose longer side is near `SHOWN`, each pixel a square."""
    zoom = max(SHOWN // max(picture.shape[:2]), 1)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def thumbnail(outcome: Outcome) -> Frames:
    """The picture, or the middle frame of the video."""
    fast = outcome.fast
    return enlarge(fast[len(fast) // 2] if fast.ndim == 4 else fast)


def beside_each_other(outcome: Outcome) -> Frames:
    """The video's frames, with the untouched ones to their left when there are any."""
    zoom = max(SHOWN // 2 // max(outcome.fast.shape[1:3]), 1)
    if outcome.untouched is None:
        return outcome.fast.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return media.side_by_side(outcome.untouched, outcome.fast, zoom)

"""Write what was measured of calibrations into docs/calibration.md.

python benchmarks/calibration_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "calibration.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
MODELS = (
    "emoji-video",
    "emoji-video-9",
    "emoji-image",
    "emoji-image-6500",
    "emoji-unet",
    "emoji-unet-5300",
)


def read(name: str) -> dict[str, Any] | None:
    """A file of results, if it is there."""
    file = HERE / "results" / name
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def fronts(model: str) -> list[str]:
    """The calibrated front and the single methods on final prompts, and what that comes to."""
    content = read(f"{model}-calibration.json")
    if content is None:
        return []
    lines = [
        f"**{model}**, {content['prompts']} final prompts (`{content['command']}`):",
        "",
        "| | speed-up | PSNR, dB (worst) | computed |",
        "|---|---|---|---|",
    ]
    for row in sorted(content["rows"], key=lambda row: -row["speedup"]):
        lines.append(
            f"| {row['name'].replace('|', ' ')} | {row['speedup']:.2f}× | {row['psnr']:.1f} "
            f"({min(row['psnr_each']):.1f}) | {row['share_computed']:.0%} |"
        )
    lines += ["", "| at least | calibrated | best by hand | best measured | ratios |"]
    lines.append("|---|---|---|---|---|")
    for bar in (30, 25):
        good = [row for row in content["rows"] if row["psnr"] >= bar]
        starts = ("calibrated", "single, by hand", "single, measured")
        best = [_fastest([r for r in good if r["name"].startswith(start)]) for start in starts]
        ours = best[0]
        ratios = " and ".join(
            f"{ours['speedup'] / row['speedup']:.2f}" for row in best[1:] if ours and row
        )
        lines.append(f"| {bar} dB | {' | '.join(map(_cell, best))} | {ratios} |")
    return [*lines, ""]


def _fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return max(rows, key=lambda row: row["speedup"], default=None)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "none"
    name = row["name"].split(": ", 1)[1].split("(")[0]
    return f"{name} {row['speedup']:.2f}× ({row['psnr']:.1f} dB)"


def claims() -> list[str]:
    """Targets and what they came to; transfer."""
    found = [(model, read(f"{model}-calibration-claims.json")) for model in MODELS]
    there = [(model, content) for model, content in found if content is not None]
    if not there:
        return []
    lines = [
        "**What was asked and what came** on final prompts (the last rows on five), "
        + ", ".join(
            f"{len(content['targets']['quality=balanced']['psnr_each'])} for {model}"
            for model, content in there
        )
        + " "
        "(`python -m benchmarks.calibration_claims MODEL FILE`; PSNR: median, worst):",
        "",
        "| asked for | " + " | ".join(model for model, _ in there) + " |",
        "|---" * (len(there) + 1) + "|",
    ]
    for part in ("targets", "transfer"):
        labels = dict.fromkeys(label for _, content in there for label in content[part])
        for label in labels:
            cells = [_claim(content[part].get(label)) for _, content in there]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _claim(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    worst = min(row["psnr_each"])
    return f"{row['methods']} {row['speedup']:.2f}×, {row['psnr']:.1f} dB ({worst:.1f})"


def main() -> None:
    """Replace what lies between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    lines = [line for model in MODELS for line in fronts(model)] + claims()
    body = "\n".join(lines).rstrip()
    PAGE.write_text(f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

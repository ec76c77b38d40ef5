"""Plot speed-up against PSNR for the rows of benchmark files; per run say what is fastest.

Ours and diffusers' caches are compared within one run only.

python benchmarks/pareto.py docs/pareto-emoji-video.png benchmarks/results/emoji-video-cpu*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QUALITIES = (30, 25)
"""Median PSNR, dB, at which our best row is compared with diffusers' best."""


def rows_of(files: list[Path]) -> list[dict[str, Any]]:
    """All rows that did not fail and skipped something."""
    found = [row for file in files for row in json.loads(file.read_text("utf-8"))["rows"]]
    return [row for row in found if "failed" not in row and row["psnr"]["median"] < 99]


def fastest(rows: list[dict[str, Any]], kind: str, quality: float) -> dict[str, Any] | None:
    """The fastest row of a kind with at least this median PSNR."""
    good = [row for row in rows if row["kind"] == kind and row["psnr"]["median"] >= quality]
    return max(good, key=lambda row: row["speedup"], default=None)


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other one beats in both, slowest first."""
    best = sorted(rows, key=lambda row: (-row["speedup"], -row["psnr"]["median"]))
    kept: list[dict[str, Any]] = []
    for row in best:
        if not kept or row["psnr"]["median"] > kept[-1]["psnr"]["median"]:
            kept.append(row)
    return kept[::-1]


def comparison(rows: list[dict[str, Any]]) -> str:
    """Markdown: our fastest and the others' fastest row at each quality."""
    lines = ["| at least | ours | the others' best | ratio |", "|---|---|---|---|"]
    for quality in QUALITIES:
        cells, speeds = [], []
        for kind in ("accel", "peer"):
            row = fastest(rows, kind, quality)
            cells.append(
                "none"
                if row is None
                else f"{row['name']} {row['speedup']:.2f}× ({row['psnr']['median']:.1f} dB)"
            )
            speeds.append(row["speedup"] if row else 1.0)
        lines.append(f"| {quality} dB | {cells[0]} | {cells[1]} | {speeds[0] / speeds[1]:.2f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    """Every row as a point, the front as a line with names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for kind, mark in (("accel", "o"), ("peer", "x")):
        chosen = [row for row in rows if row["kind"] == kind]
        axes.scatter(
            [row["speedup"] for row in chosen],
            [row["psnr"]["median"] for row in chosen],
            marker=mark,
            label={"accel": "accel", "peer": "diffusers, cache-dit, ParaAttention"}[kind],
        )
    best = front(rows)
    axes.plot([r["speedup"] for r in best], [r["psnr"]["median"] for r in best], linewidth=0.7)
    for row in best:
        place = (row["speedup"], row["psnr"]["median"])
        axes.annotate(
            row["name"][:48], place, fontsize=6, xytext=(3, 3), textcoords="offset points"
        )
    axes.set_xlabel("measured speed-up")
    axes.set_ylabel("median PSNR to the untouched result, dB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    """Write the picture, print the comparison."""
    output, *files = map(Path, sys.argv[1:])
    plot(rows_of(files), output)
    for file in files:
        rows = rows_of([file])
        if any(row["kind"] == "peer" for row in rows):
            print(f"{file.name}\n\n{comparison(rows)}\n")


if __name__ == "__main__":
    main()

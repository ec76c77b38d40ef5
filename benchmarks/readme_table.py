"""Rewrite the table of measured results in README.md from the JSON that `accel bench` wrote.

python benchmarks/readme_table.py benchmarks/results/emoji-video-cpu-whole.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pareto import front

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = Path(__file__).parent.parent / "README.md"


def table(result: dict[str, Any]) -> str:
    """The Pareto fronts of ours and of the others above 24 dB, in Markdown; failing rows below."""
    plan, machine, versions = result["plan"], result["machine"], result["versions"]
    rows = [row for row in result["rows"] if "failed" not in row]
    bright = [row for row in rows if row["psnr"]["median"] >= 24]
    good = [row for kind in ("accel", "peer") for row in front_of(bright, kind)]
    named = [f"{name} {versions[name]}" for name in ("cache-dit", "para-attn") if name in versions]
    others = "".join(f", {each}" for each in named)
    theirs = "the other libraries'" if named else "diffusers' own"
    lines = [
        f"`{plan['model']}`, {plan['steps']} steps, {result['prompts']} held-out prompts, "
        f"{machine['device']} with {machine['threads']} threads, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}{others}. The settings that no other one of ours, or of "
        f"{theirs}, beats in both speed and PSNR, fastest first:",
        "",
        f"| | speed-up{' (spread)' if plan['repeats'] > 1 else ''} | computed "
        "| PSNR, dB (worst decile) | SSIM | feature distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(good, key=lambda row: -row["speedup"]):
        low, high = row["speedup_spread"]
        whose = row["kind"] == "accel" or " of " in row["name"]
        name = row["name"] if whose else f"{row['name']} of diffusers"
        spread = f" ({low:.2f}–{high:.2f})" if plan["repeats"] > 1 else ""
        lines.append(
            f"| {name} | {row['speedup']:.2f}×{spread} | "
            f"{row['share_computed']:.0%} | {row['psnr']['median']:.1f} "
            f"({row['psnr']['worst_decile']:.1f}) | {row['ssim_gaussian11']['median']:.3f} | "
            f"{row['feature_distance']['median']:.3f} |"
        )
    failed = [f"{row['name']} ({row['failed']})" for row in result["rows"] if "failed" in row]
    if failed:
        lines += ["", f"Failing in this run: {'; '.join(failed)}."]
    cost = result["overhead"]
    lines += [
        "",
        f"With nothing reused a run takes {cost['run']:+.1%} time; hooking costs "
        f"{cost['microseconds_per_block']:.1f} µs a block. All rows: "
        "`benchmarks/results/`; the command:",
        "",
        "```",
        result["command"],
        "```",
    ]
    return "\n".join(lines)


def front_of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind that no other of that kind beats in both."""
    return front([row for row in rows if row["kind"] == kind])


def main() -> None:
    """Replace what lies between the two markers."""
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

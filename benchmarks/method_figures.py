"""Write each method's measured rows into its page under docs/methods.

python benchmarks/method_figures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel import registry

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "methods"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


Row = tuple[dict[str, Any], dict[str, Any]]
"""A row and the content of its file."""


def rows() -> dict[str, list[Row]]:
    """By class name, from all result files; of one model and setting the row of most prompts."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for file in sorted((HERE / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for row in content.get("rows", []):
            if row.get("kind") == "accel" and "failed" not in row:
                mine = found.setdefault(row["name"].split("(")[0], {})
                key = (content["plan"]["model"], row["name"])
                if key not in mine or content["prompts"] > mine[key][1]["prompts"]:
                    mine[key] = (row, content)
    return {name: list(mine.values()) for name, mine in found.items()}


def table(measured: list[Row]) -> str:
    """Markdown, one line a row."""
    lines = [
        "Measured on the zoo, against the untouched run of the same seed (files and commands in",
        "`benchmarks/results/`):",
        "",
        "| model, prompts | settings | speed-up | computed | PSNR, dB | feature distance |",
        "|---|---|---|---|---|---|",
    ]
    for row, content in measured:
        model = content["plan"]["model"].removeprefix("zoo:")
        lines.append(
            f"| {model}, {content['prompts']} | `{row['name']}` | {row['speedup']:.2f}× | "
            f"{row['share_computed']:.0%} | {row['psnr']['median']:.1f} | "
            f"{row['feature_distance']['median']:.3f} |"
        )
    return "\n".join(lines)


def staged(name: str) -> str:
    """The rows of `benchmarks.staged` of a sampler, with the untouched ones; or nothing."""
    lines = []
    content = json.loads((HERE / "results" / "zoo-staged.json").read_text(encoding="utf-8"))
    for model, run in content["runs"].items():
        mine = [row for row in run["rows"] if name in row["row"] or not row["methods"]]
        if not any(row["methods"] for row in mine):
            continue
        lines += [
            *([""] if lines else []),
            f"Scores on {model}, prompts: {run['prompts']} (`{run['command']}`; log p is the mean",
            "log-probability of the right name over the untouched run's, with its 95 % interval):",
            "",
            "| row | steps | speed-up | caption | colour | motion | log p | KID | feature distance "
            "|\n|---|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            gain, motion = row["logp_over_untouched"], row.get("motion")
            lines.append(
                f"| {row['row']} | {row['steps']} | {row['speed_up']:.2f}× | "
                f"{row['caption_top1']:.0%} | {row['colour']:.0%} | "
                f"{'–' if motion is None else f'{motion:.0%}'} | {gain['mean']:+.1f} "
                f"({gain['low']:+.1f} to {gain['high']:+.1f}) | {row['kid']:.3f} | "
                f"{row['feature_distance']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Replace what lies between the markers of each page, or add it at the end."""
    measured = rows()
    for place in registry.METHODS.values():
        module, name = place.split(":")
        page = PAGES / f"{module.rsplit('.', 1)[1]}.md"
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2] if rest else "\n"
        tables = [table(measured[name])] if name in measured else []
        found = staged(name) if ".samplers." in module else ""
        tables += [found] if found else []
        if tables:
            block = "\n".join((BEGIN, "\n\n".join(tables), END))
            page.write_text(f"{before.rstrip()}\n\n{block}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

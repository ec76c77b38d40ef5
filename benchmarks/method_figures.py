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


def rows() -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(row, its file's content) by class name, from all result files."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for file in sorted((HERE / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for row in content.get("rows", []):
            if row.get("kind") == "accel" and "failed" not in row:
                found.setdefault(row["name"].split("(")[0], []).append((row, content))
    return found


def table(measured: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
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


def main() -> None:
    """Replace what lies between the markers of each page, or add it at the end."""
    measured = rows()
    for place in registry.METHODS.values():
        module, name = place.split(":")
        page = PAGES / f"{module.rsplit('.', 1)[1]}.md"
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2] if rest else "\n"
        if name in measured:
            block = f"{BEGIN}\n{table(measured[name])}\n{END}"
            page.write_text(f"{before.rstrip()}\n\n{block}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

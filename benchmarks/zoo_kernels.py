"""What low-bit attention, low-bit linears and sparsity cost in quality on the zoo, on a CPU.

    python benchmarks/zoo_kernels.py benchmarks/results/zoo-kernels-cpu.json --models emoji-video
    python benchmarks/zoo_kernels.py benchmarks/results/zoo-sparse-cpu.json --sparse \\
        --models emoji-video
    python benchmarks/zoo_kernels.py benchmarks/results/zoo-kernels-cpu*.json --table

The kernels' torch references run, so that times mean nothing and quality is what a GPU would give
up to the order of sums. PSNR and feature distance are against the untouched run of the same seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import accel
from accel import metrics, model_zoo
from accel.bench import pictures
from accel.generate import make, versions

MODELS = ("emoji-video", "emoji-unet", "emoji-image")
PROMPTS, STEPS = 8, 20
LOW_BIT: dict[str, Any] = {"least": 1, "reference": True}
OWN: dict[str, Any] = {"least": 64, "backend": "own"}


def settings() -> list[tuple[accel.Method, ...]]:
    """What is measured; "adaptive" twice, with its own bounds and with tight ones."""
    low_bit = [accel.Attention(name, **LOW_BIT) for name in ("sage_int8", "sage_int8_fp8")]
    adaptive = [
        accel.Attention("adaptive", **LOW_BIT),
        accel.Attention("adaptive", similarity=0.9999, error=0.015, **LOW_BIT),
    ]
    linears = [accel.Linear(name, **OWN) for name in ("w8a8", "fp8", "int8", "int4")]
    single = [(each,) for each in (*linears, *low_bit, *adaptive)]
    return [*single, (low_bit[1], linears[0])]


def sparse_settings() -> list[tuple[accel.Method, ...]]:
    """Block-sparse attention; the pictures' blocks are small because the pictures are."""
    shape = {"tile": (1, 4, 4), "least": 64}
    found: list[Any] = [accel.NABLA(mass=mass, **shape) for mass in (0.95, 0.9, 0.8, 0.6, 0.4)]
    found.append(accel.NABLA(mass=0.6, window=(1, 0, 0), **shape))
    found += [accel.SpargeAttention(topk=share, warmup=0.2, **shape) for share in (0.8, 0.6, 0.4)]
    found += [accel.SparseVideoGen(keep=share, **shape) for share in (0.8, 0.6, 0.4)]
    found += [accel.RadialAttention(decay=decay, **shape) for decay in (0.95, 0.2)]
    return [(each,) for each in found]


def measure(
    name: str, count: int, tried: list[tuple[accel.Method, ...]]
) -> Iterator[dict[str, Any]]:
    """Some settings on one model: prompts it was not tuned on, one seed each; grows row by row."""
    pipe, call, _ = model_zoo.load(name)
    call["num_inference_steps"] = STEPS
    prompts = model_zoo.prompts(name, "heldout").read_text().split("\n")[:count]
    plain = [make(pipe, {**call, "prompt": each}, seed)[0] for seed, each in enumerate(prompts)]
    rows = []
    for methods in tried:
        kept: list[float] = []
        with accel.patched(pipe, *methods) as patch, shares_kept(kept):
            if getattr(methods[0], "kernel", "") == "adaptive":
                first = model_zoo.prompts(name, "train").read_text().split("\n")[0]
                make(pipe, {**call, "prompt": first}, 0)
            made = [make(pipe, {**call, "prompt": p}, s)[0] for s, p in enumerate(prompts)]
            plan = getattr(patch.methods[0], "plan", None)
        pairs = [(pictures(a), pictures(b)) for a, b in zip(made, plain, strict=True)]
        rows.append(
            {
                "methods": [_label(each) for each in methods],
                "psnr": _summary([metrics.psnr(a, b) for a, b in pairs], worst=0),
                "feature_distance": _summary(
                    [metrics.feature_distance(a, b) for a, b in pairs], worst=-1
                ),
                "plan": plan,
                "blocks_kept": statistics.fmean(kept) if kept else None,
            }
        )
        print(name, rows[-1]["methods"], rows[-1]["psnr"], flush=True)
        yield {"model": name, "prompts": len(prompts), "steps": STEPS, "rows": rows}


@contextmanager
def shares_kept(into: list[float]) -> Iterator[None]:
    """The share of key blocks that is kept at each attention, text included."""
    from accel.kernels import sparse_blocks

    inner = sparse_blocks.block_sparse_attention

    def look(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        into.append(float(mask.float().mean()))
        return inner(query, key, value, mask, **options)

    sparse_blocks.block_sparse_attention = look
    try:
        yield
    finally:
        sparse_blocks.block_sparse_attention = inner


def _label(method: Any) -> str:
    """The settings that make the difference, without what every row has."""
    shown = accel.Recipe.of((method,)).entries[0].settings
    shown = {k: v for k, v in shown.items() if k not in (*LOW_BIT, *OWN)}
    main = [repr(shown.pop(k)) for k in ("kernel", "format") if k in shown]
    if isinstance(method, accel.Linear) and not main:
        main = ["'w8a8'"]
    return f"{type(method).__name__}({', '.join([*main, *(f'{k}={v}' for k, v in shown.items())])})"


def _summary(values: list[float], worst: int) -> dict[str, float]:
    return {"median": statistics.median(values), "worst": sorted(values)[worst]}


def table(models: list[dict[str, Any]]) -> str:
    """Markdown: a row for each setting, a column for each model."""
    head = " | ".join(f"{each['model']}, {each['prompts']} prompts" for each in models)
    lines = [f"| settings | {head} |", "|---|" + "---|" * len(models)]
    by_name = [{" + ".join(r["methods"]): r for r in each["rows"]} for each in models]
    for label in dict.fromkeys(label for rows in by_name for label in rows):
        cells = [_cell(rows[label]) if label in rows else "–" for rows in by_name]
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    psnr, distance, kept = row["psnr"], row["feature_distance"]["median"], row.get("blocks_kept")
    share = f", {kept:.0%} kept" if kept else ""
    return f"{psnr['median']:.1f} dB (worst {psnr['worst']:.1f}), {distance:.3f}{share}"


def plans(models: list[dict[str, Any]]) -> str:
    """Markdown: how many layers have which kernel in each fifth of the schedule."""
    lines = ["| model | settings | fifth of the schedule: layers by kernel |", "|---|---|---|"]
    for model in models:
        for row in model["rows"]:
            if row["plan"] is None:
                continue
            fifths = zip(*row["plan"].values(), strict=True)
            shares = ["; ".join(f"{n} {k}" for k, n in sorted(Counter(f).items())) for f in fifths]
            lines.append(f"| {model['model']} | `{row['methods'][0]}` | {' / '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure into the file, or show a measured one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--table", action="store_true", help="show measured files as tables")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--sparse", action="store_true", help="measure block-sparse attention")
    asked = parser.parse_args()
    if asked.table:
        models = [m for path in asked.paths for m in json.loads(path.read_text())["models"]]
        print(table(models), plans(models), sep="\n\n")
        return
    torch.set_num_threads(1)
    path = asked.paths[0]
    tried = sparse_settings() if asked.sparse else settings()
    options = f"{'--sparse ' * asked.sparse}--models {' '.join(asked.models)}"
    result: dict[str, Any] = {
        "command": f"python benchmarks/zoo_kernels.py {path} {options}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu, torch references of the kernels",
        "versions": versions(),
        "models": [],
    }
    for name in asked.models:
        result["models"].append({})
        for found in measure(name, asked.prompts, tried):
            result["models"][-1] = found
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Staged samplers on the zoo: speed, formula scores and distances to the untouched run.

    python -m benchmarks.staged emoji-image --num-prompts 34
    python -m benchmarks.staged emoji-unet --num-prompts 34
    python -m benchmarks.staged emoji-video --num-prompts 34
    python -m benchmarks.staged emoji-image --num-prompts 34 --rows LSSGen Progressive
    python -m benchmarks.staged --maps docs/ralu-regions.png

For each prompt all rows run in turn. Speed-up is untouched CPU seconds (one thread) over a row's,
the median over prompts: other jobs on the machine disturb it less than wall-clock time.
`logp` is the mean log-probability that a classifier of real pictures gives the right name; `kid` is
against real renders. The interval is the 95 % bootstrap of the paired difference to `untouched`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Generator, Tensor

import accel
from accel import generate, metrics, model_zoo
from accel.latent_upsampler import LatentUpsampler
from accel.recipe import Recipe
from accel.samplers import ralu
from demos.zoo import data, text
from demos.zoo import evaluate as judging

RESULT = Path(__file__).parent / "results" / "zoo-staged.json"
PLAN: dict[str, Any] = {
    "shares": (0.2, 0.3, 0.5),
    "ends": (0.05, 0.35),
    "shifts": (8.14, 2.86, 1.5),
    "jump": 20.0,
    "ratio": 0.5,
    "positions": "spread",
}
LATE = {**PLAN, "ratio": 0.0, "shares": (0.15, 0.25, 0.6)}
BOTTLENECK: dict[str, Any] = {
    "scale": 0.5,
    "shares": (0.1, 0.3, 0.6),
    "up": 30.0,
    "positions": "spread",
}
FEWER_FRAMES = accel.VGDFR(keep=0.67, look=0.15, tail=0)
UNTRAINED = Path("out/untrained-upsampler")
UPSAMPLED: dict[str, tuple[int, tuple[Any, ...]]] = {
    "untouched, 20 steps": (20, ()),
    "Progressive": (
        28,
        (accel.Progressive(shares=(0.4, 0.6), renoise=4.0, positions="spread"),),
    ),
    "LSSGen": (28, (accel.LSSGen(positions="spread"),)),
    "LSSGen, bilinear": (28, (accel.LSSGen(positions="spread", upsampler=str(UNTRAINED)),)),
    "LSSGen(start=0.5)": (28, (accel.LSSGen(positions="spread", start=0.5),)),
    "LSSGen(start=0.5), bilinear": (
        28,
        (accel.LSSGen(positions="spread", start=0.5, upsampler=str(UNTRAINED)),),
    ),
}
"""LSSGen beside Progressive with the same shares, which begins the full size noisier."""


def computing(stages: str) -> accel.StepMask:
    """A line through the last two computed calls elsewhere; stages are apart by spaces."""
    mask = tuple(int(entry) for entry in stages.replace(" ", ""))
    return accel.StepMask(mask, reuse=accel.Newton(order=1))


ROWS: dict[str, dict[str, tuple[int, tuple[Any, ...]]]] = {
    "emoji-unet": {"untouched": (50, ()), **UPSAMPLED},
    "emoji-image": {
        "untouched": (50, ()),
        "untouched, 25 steps": (25, ()),
        "BottleneckSampling": (30, (accel.BottleneckSampling(**BOTTLENECK),)),
        "BottleneckSampling, fresh noise": (
            30,
            (accel.BottleneckSampling(**BOTTLENECK, noise="fresh"),),
        ),
        "BottleneckSampling and StepMask": (
            20,
            (accel.BottleneckSampling(**BOTTLENECK), computing("11 110101 111111010101")),
        ),
        "RALU": (30, (accel.RALU(**PLAN),)),
        "RALU, fresh noise": (30, (accel.RALU(**PLAN, noise="fresh"),)),
        "RALU, random regions": (30, (accel.RALU(**PLAN, regions="random"),)),
        "RALU, all late": (30, (accel.RALU(**LATE),)),
        "RALU and StepMask": (20, (accel.RALU(**PLAN), computing("1111 110101 1111110101"))),
        **UPSAMPLED,
    },
    "emoji-video": {
        "untouched": (50, ()),
        "VGDFR": (50, (FEWER_FRAMES,)),
        "VGDFR and FitCache": (50, (FEWER_FRAMES, accel.FitCache(share=0.2))),
        "VGDFR(tail=1)": (50, (accel.VGDFR(keep=0.67),)),
        "VGDFR(keep=0.6)": (50, (accel.VGDFR(keep=0.6, tail=0),)),
        "VGDFR(keep=0.6, all layers global)": (
            50,
            (accel.VGDFR(keep=0.6, tail=0, global_layers="all"),),
        ),
        **UPSAMPLED,
    },
}


def clip(pipe: Any, call: dict[str, Any], caption: str, seed: int) -> Tensor:
    """(frames, 3, height, width) in [0, 1]."""
    out = pipe(
        prompt=caption, generator=Generator().manual_seed(seed), **{**call, "output_type": "np"}
    )
    made = torch.tensor(out.frames[0] if hasattr(out, "frames") else out.images)
    return made.permute(0, 3, 1, 2)


def measured(model: str, names: list[str], captions: list[str]) -> dict[str, dict[str, Any]]:
    """Clips and CPU seconds of rows."""
    pipe, call, _ = model_zoo.load(model)
    trained = LatentUpsampler.load(model_zoo.path(model) / "adapters" / "lssgen")
    LatentUpsampler(trained.config).save(UNTRAINED, {"steps": 0})  # the bilinear resize
    rows: dict[str, dict[str, Any]] = {name: {"clips": [], "seconds": []} for name in names}
    chosen = {name: _settled(pipe, call, model, *ROWS[model][name]) for name in names}
    clip(pipe, {**call, "num_inference_steps": 4}, captions[0], 0)
    for seed, caption in enumerate(captions):
        for name in names:
            steps = ROWS[model][name][0]
            if chosen[name]:
                accel.patch(pipe, *chosen[name])
            began = time.process_time()
            made = clip(pipe, {**call, "num_inference_steps": steps}, caption, seed)
            rows[name]["seconds"].append(time.process_time() - began)
            rows[name]["clips"].append(made)
            accel.unpatch(pipe)
        print(seed, caption, flush=True)
    return rows


def _settled(
    pipe: Any, call: dict[str, Any], model: str, steps: int, methods: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The methods with what they measure in a first run, here one of a training caption."""
    if not methods:
        return ()
    given = {**call, "num_inference_steps": steps, "prompt": _captions(model, "train")[0]}
    recipe = Recipe.of(methods)
    return generate.settle(pipe, recipe, lambda: generate.make(pipe, given, 0)).methods


def judged(model: str, captions: list[str], rows: dict[str, dict[str, Any]]) -> list[Any]:
    """One JSON row for each."""
    call = model_zoo.settings(model)["call"]
    form = call["height"], call.get("num_frames", 1)
    names = text.known_names(model_zoo.load(model)[0])
    judge = judging.CaptionClassifier(*form, names)
    known = judging.reference_features(*form, names)
    labels = torch.tensor([names.index(data.parse(caption)[0]) for caption in captions])
    untouched = torch.stack(rows["untouched"]["clips"])
    found, first = [], None
    for name, row in rows.items():
        clips = torch.stack(row["clips"])
        ratios = [a / b for a, b in zip(rows["untouched"]["seconds"], row["seconds"], strict=True)]
        certain = judge.scores(judging.clip_features(clips)).unflatten(0, (-1, len(captions)))
        certain = certain[:, torch.arange(len(captions)), labels].mean(0)
        first = certain if first is None else first
        steps, methods = ROWS[model][name]
        found.append(
            {
                "model": model,
                "row": name,
                "steps": steps,
                "methods": [repr(method) for method in methods],
                "speed_up": round(statistics.median(ratios), 3),
                "speed_up_quartiles": [round(q, 3) for q in statistics.quantiles(ratios)[::2]],
                **judging.scores(clips, captions, judge, known),
                "logp": float(certain.mean()),
                "logp_over_untouched": judging.paired_difference(certain, first),
                "feature_distance": metrics.feature_distance(untouched, clips),
                "psnr": metrics.psnr(untouched, clips),
            }
        )
    return found


def maps(target: Path, count: int = 6) -> None:
    """Pictures, and the coarse tokens that RALU split in each, beside each other."""
    pipe, call, _ = model_zoo.load("emoji-image")
    captions = _captions("emoji-image", "heldout")[:count]
    method = accel.RALU(**PLAN)
    columns = []
    chosen: list[Tensor] = []
    original = ralu.RALU._chosen

    def noted(self: Any, crossing: Any) -> Tensor:
        chosen.append(original(self, crossing))
        return chosen[-1]

    ralu.RALU._chosen = noted  # type: ignore[method-assign]
    try:
        with accel.patched(pipe, method):
            for seed, caption in enumerate(captions):
                made = clip(pipe, {**call, "num_inference_steps": 30}, caption, seed)[0]
                side = round(len(chosen[-1]) ** 0.5)
                mask = chosen[-1].reshape(1, side, side).float()
                mask = mask.repeat_interleave(made.shape[-1] // side, 1)
                mask = mask.repeat_interleave(made.shape[-1] // side, 2)
                columns.append(torch.cat((made, made * (0.25 + 0.75 * mask)), 1))
    finally:
        ralu.RALU._chosen = original  # type: ignore[method-assign]
    pixels = (torch.cat(columns, 2).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(target)


def _checked(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any] | None:
    """The earlier run, if any, that `--rows` measures again in part; said before, not after."""
    if old and any(old[each] != new[each] for each in ("prompts", "versions", "machine")):
        raise SystemExit("--rows: the result file's run is of other prompts or versions")
    return old


def merged(old: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """An earlier run of all rows with some of them measured again or added."""
    again = [row for row in rows if row["row"] != "untouched"]
    names = [row["row"] for row in again]
    return {**old, "rows": [row for row in old["rows"] if row["row"] not in names] + again}


def _captions(model: str, part: Any) -> list[str]:
    lines = model_zoo.prompts(model, part).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line]


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=list(ROWS))
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each prompt")
    parser.add_argument("--part", default="final", choices=["heldout", "final"])
    parser.add_argument("--rows", nargs="+", help="of the model, beside untouched; all if left out")
    parser.add_argument("--maps", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.maps:
        maps(given.maps)
    if given.model is None:
        return
    captions = _captions(given.model, given.part)[: given.num_prompts] * given.seeds
    names = ["untouched", *given.rows] if given.rows else list(ROWS[given.model])
    run = {
        "command": shlex.join(["python", "-m", "benchmarks.staged", *sys.argv[1:]]),
        "prompts": f"{given.part}, the first {given.num_prompts}"
        + (f", {given.seeds} seeds each" if given.seeds > 1 else ""),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "machine": f"{platform.machine()} CPU, one thread, other jobs beside",
    }
    old = json.loads(given.output.read_text()) if given.output.exists() else {"runs": {}}
    known = _checked(old["runs"].get(given.model), run) if given.rows else None
    rows = judged(given.model, captions, measured(given.model, names, captions))
    old["runs"][given.model] = {**run, "rows": rows} if known is None else merged(known, rows)
    given.output.write_text(json.dumps(old, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()

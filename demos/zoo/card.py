"""Write a zoo model card from its evaluation: `python -m demos.zoo.card emoji-video FILE`."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from demos.zoo import data

ABOUT = {
    "emoji-video": (
        "WanPipeline",
        "Text to video, 32×32 pixels, 17 frames: WanTransformer3DModel (14 blocks of width 128, 576 "
        "tokens), AutoencoderKLWan (4× in space, 2× in time, 32 channels), UMT5 text encoder (2 "
        "layers), flow matching with shift 3.",
        "demos.zoo.emoji_video",
        "two CPU threads, fp32 to step 2802, then `--bf16`, from step 5800 on half of the noise levels "
        "low",
    ),
    "emoji-image": (
        "FluxPipeline",
        "Text to picture with true CFG, 128×128 pixels, 256 image tokens: FluxTransformer2DModel (3 "
        "double and 6 single blocks of width 128), AutoencoderKL (4×, 8 channels), CLIP and T5 text "
        "encoders (2 layers each), flow matching with shift 2.",
        "demos.zoo.emoji_image",
        "fp32 on one CPU thread, from step 6500 on half of the noise levels "
        "low, and to step 8450 at 128×128 alone, from then on a quarter at 64×64",
    ),
    "emoji-unet": (
        "StableDiffusionPipeline",
        "Text to picture, 64×64 pixels, 16×16 latents: UNet2DConditionModel (64, 128, 128 channels), "
        "AutoencoderKL (4×, 12 channels), CLIP text encoder (2 layers), ε-prediction.",
        "demos.zoo.emoji_unet",
        "two CPU threads, `--bf16`",
    ),
}


def card(name: str, result: dict[str, Any], minutes: float, steps: int, file: Path) -> str:
    """The Markdown of a card; every figure comes from `result` or the loss curve."""
    pipeline, about, module, where = ABOUT[name]
    motion = ["motion"] if "motion" in result["real"] else []
    columns = ["colour", *motion, "caption_top1", "kid"]
    best, names = result["runs"][0], result.get("names", len(data.FIRST_NAMES))
    rows = [["real renders", *(_cell(result["real"], column) for column in columns)]]
    for run in result["runs"]:
        label = f"{run['steps']} steps, guidance {run['guidance']:g}"
        rows.append([label, *(_cell(run, column) for column in columns)])
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: {"text-to-video" if motion else "text-to-image"}
---

# {name}

{about}

A small model that was really trained, for testing and measuring acceleration. Loads with
`{pipeline}.from_pretrained` of plain diffusers; the arguments it was made for are in `call.json`.

**Data.** Noto Emoji pictures (Copyright Google Inc., Apache License 2.0; npm package
emoji-datasource-google 16.0.0), {names} names on 8 background colours{", 9 motions" if motion else ""}.
One combination in eight is never shown in training.

**Recipe.** `python -m {module}`, {where}: {steps} steps, {minutes:.0f} minutes for the
denoiser and its text encoder (loss curve in `loss.csv`); 10 % caption drop-out, averaged weights.

**Figures** on {result["clips"]} results for {result["prompts"]} captions never seen in training
(`{file}`). Colour and motion are
judged by formula, the caption among {names} names by a linear classifier on efficientnet-lite0 features
({result["classifier_accuracy_on_real"]:.0%} right on real pictures), KID on those features against
real ones of other captions.

{table(["", *columns], rows)}

**Weaknesses.** Knows nothing but these captions. Of the results with {best["steps"]} steps,
{1 - best["caption_top1"]:.0%} were not recognised as the object asked for (chance: {1 - 1 / names:.1%}), and
{1 - best["colour"]:.0%} had another ground.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def lora_table(result: dict[str, dict[str, float]]) -> str:
    """How strongly each concept shows, by what is active."""
    concepts = list(next(iter(result.values())))
    rows = [
        [name, *(f"{scores[each]:.3f}" for each in concepts)] for name, scores in result.items()
    ]
    return table(["active", *concepts], rows)


def loras(result: dict[str, dict[str, float]], folder: Path) -> str:
    """The section on a model's LoRAs, from `demos.zoo.loras score`."""
    return f"""
**LoRAs** (rank 8, in `{folder}`; `python -m demos.zoo.loras train`, 4 to 11 minutes each): `ink` and
`mosaic` are styles, `sepia` a colour world, `trophy` an object that the base never saw, called "moon
star". How strongly results show each, measured by `python -m demos.zoo.loras score`: for trophy the share
nearer to real trophies than to any other name, for the others one minus the distance of a result from its
own inked, sepia or mosaic version.

{lora_table(result)}
"""


def _cell(scores: dict[str, float], column: str) -> str:
    return f"{scores[column]:.3f}" if column == "kid" else f"{scores[column]:.0%}"


def curve_of(folder: Path) -> list[list[float]]:
    """Step, minutes of the run it was part of, and loss, by line of a model's loss.csv."""
    with (folder / "loss.csv").open() as file:
        return [[float(each) for each in row] for row in list(csv.reader(file))[1:]]


def minutes_of(curve: list[list[float]]) -> float:
    """Of a loss curve's (step, minutes, loss): a resumed run counts its minutes from zero again."""
    minutes = previous = 0.0
    for _, spent, _ in curve:
        minutes += previous if spent < previous else 0.0
        previous = spent
    return minutes + previous


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(ABOUT))
    parser.add_argument("evaluation", type=Path)
    options = parser.parse_args()
    folder = Path("zoo") / options.name
    curve = curve_of(folder)
    minutes, steps = minutes_of(curve), int(curve[-1][0])
    result = json.loads(options.evaluation.read_text())
    text = card(options.name, result, minutes, steps, options.evaluation)
    if (folder / "loras.json").exists():
        text += loras(json.loads((folder / "loras.json").read_text()), folder / "loras")
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()

"""Are both objects of a caption there, each where it says?

    python -m demos.zoo.evaluate_pairs --model emoji-unet --json out.json

A picture is cut at the middle of the line between the two places, and each part is named by the
classifier that judges captions of one object. Real renders show how well that can go.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from accel import metrics, model_zoo
from demos.zoo import data, evaluate, text

PART = 0.56
"""Side of a part, as a share of the picture."""


def parts(picture: Tensor, relation: str) -> tuple[Tensor, Tensor]:
    """Where the first and the second object should be: two (3, size, size) of (3, size, size)."""
    size = picture.shape[-1]
    side = round(PART * size)
    middle = (size - side) // 2
    found = []
    for sign in (1, -1):
        x, y = (middle + sign * step * middle for step in data.RELATIONS[relation])
        cut = picture[None, :, y : y + side, x : x + side]
        found.append(functional.interpolate(cut, (size, size), mode="bilinear")[0])
    return found[0], found[1]


def pair_scores(
    pictures: Tensor, captions: list[str], judge: evaluate.CaptionClassifier
) -> dict[str, float]:
    """Shares with the first, the second and both objects in place; pictures (n, 3, h, w)."""
    wanted = [pair for caption in captions if (pair := data.parse_pair(caption))]
    cut = [parts(one, relation) for one, (_, relation, _, _) in zip(pictures, wanted, strict=True)]
    guesses = []
    for index in range(2):
        features = metrics.lite0_features(torch.stack([each[index] for each in cut]))
        guesses.append([judge.names[int(best)] for best in judge.scores(features).argmax(1)])
    first = [guess == pair[0] for guess, pair in zip(guesses[0], wanted, strict=True)]
    second = [guess == pair[2] for guess, pair in zip(guesses[1], wanted, strict=True)]
    swapped = [
        (one, two) == (pair[2], pair[0]) for one, two, pair in zip(*guesses, wanted, strict=True)
    ]
    grounds = [
        evaluate.colour_of(one[None]) == pair[3] for one, pair in zip(pictures, wanted, strict=True)
    ]
    hits = {
        "first": first,
        "second": second,
        "both": [a and b for a, b in zip(first, second, strict=True)],
        "swapped": swapped,
        "colour": grounds,
    }
    return {name: sum(each) / len(each) for name, each in hits.items()}


def real_pairs(captions: list[str], size: int) -> Tensor:
    """Renders of captions of two objects: (n, 3, size, size) in [0, 1]."""
    rows = [
        (
            data.NAMES.index(first),
            list(data.RELATIONS).index(relation),
            data.NAMES.index(second),
            data.COLOUR_NAMES.index(colour),
        )
        for caption in captions
        for first, relation, second, colour in [data.parse_pair(caption) or ("", "", "", "")]
    ]
    generator = Generator().manual_seed(19)
    columns = torch.tensor(rows).unbind(1)
    return (data.render_pairs(data.sprites(), *columns, size, generator) + 1) / 2


def evaluated(model: str, captions: list[str], steps: int | None) -> dict[str, Any]:
    """Scores of real renders and of a zoo model, with its guidance and without."""
    pipe, call, _ = model_zoo.load(model)
    call |= {"num_inference_steps": steps or call["num_inference_steps"]}
    judge = evaluate.CaptionClassifier(call["height"], 1, text.known_names(pipe))
    found = {"real": pair_scores(real_pairs(captions, call["height"]), captions, judge)}
    for scale in (call["guidance_scale"], 1.0):
        made = evaluate.generated_clips(pipe, call | {"guidance_scale": scale}, captions)[:, 0]
        found[f"guidance {scale:g}"] = pair_scores(made, captions, judge)
        print(scale, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines = (model_zoo.path(options.model) / "prompts_pairs.txt").read_text().splitlines()
    found = evaluated(options.model, lines[: options.num_prompts], options.steps)
    if options.json:
        command = " ".join(["python -m demos.zoo.evaluate_pairs", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

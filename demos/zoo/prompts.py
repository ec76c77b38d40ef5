"""Write the zoo's prompt files: `python -m demos.zoo.prompts`.

`train` holds captions seen in training (a sample; of emoji-unet all of one object), `heldout`
captions never seen, for tuning and validation, and `final` other captions never seen, for final
figures only. emoji-image and emoji-video were trained on the first 64 names and have 64 final
captions; emoji-unet has all, and `pairs` with two objects.
"""

from __future__ import annotations

import random
from pathlib import Path

from demos.zoo import data

SIZES = {"train": 256, "heldout": 64, "final": 64}
PAIRS = 64
"""Captions of two objects, for final figures only."""


def lines(video: bool, names: list[str]) -> dict[str, list[str]]:
    """The captions of each file, shuffled by a fixed seed."""
    shuffled = random.Random(0)
    seen = [data.caption(*entry) for entry in data.combinations(video, False, names)]
    unseen = [data.caption(*entry) for entry in data.combinations(video, True, names)]
    shuffled.shuffle(seen)
    shuffled.shuffle(unseen)
    half = min(SIZES["heldout"], len(unseen) // 2)
    few = names == data.FIRST_NAMES
    return {
        "train": seen[: SIZES["train"]] if few else seen,
        "heldout": unseen[:half],
        "final": unseen[half : half + SIZES["final"]] if few else unseen[half:],
    }


def pair_lines() -> list[str]:
    """Captions of two objects never seen in training."""
    drawn, found = random.Random(1), []
    while len(found) < PAIRS:
        first, second = drawn.sample(data.NAMES, 2)
        relation, colour = drawn.choice([*data.RELATIONS]), drawn.choice(data.COLOUR_NAMES)
        if data.held_out(first, relation, second, colour):
            found.append(data.pair_caption(first, relation, second, colour))
    return found


def files() -> dict[str, list[str]]:
    """All prompt files: their place in the zoo's folder, and their captions."""
    kinds = {
        "prompts_{}.txt": lines(True, data.FIRST_NAMES),
        "prompts_{}_image.txt": lines(False, data.FIRST_NAMES),
        "emoji-unet/prompts_{}.txt": lines(False, data.NAMES) | {"pairs": pair_lines()},
    }
    return {
        name.format(part): captions
        for name, parts in kinds.items()
        for part, captions in parts.items()
    }


def main(folder: Path = Path("zoo")) -> None:
    for name, captions in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()

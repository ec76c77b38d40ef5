"""Write the zoo's prompt files: `python -m demos.zoo.prompts`.

`train` holds captions seen in training (a sample), `heldout` captions never seen, for tuning and
validation, and `final` other captions never seen, for final figures only.
"""

from __future__ import annotations

import random
from pathlib import Path

from demos.zoo import data

SIZES = {"train": 256, "heldout": 64, "final": 64}


def lines(video: bool) -> dict[str, list[str]]:
    """The captions of each file, shuffled by a fixed seed."""
    shuffled = random.Random(0)
    seen = [data.caption(*entry) for entry in data.combinations(video, held=False)]
    unseen = [data.caption(*entry) for entry in data.combinations(video, held=True)]
    shuffled.shuffle(seen)
    shuffled.shuffle(unseen)
    half = min(SIZES["heldout"], len(unseen) // 2)
    return {
        "train": seen[: SIZES["train"]],
        "heldout": unseen[:half],
        "final": unseen[half : half + SIZES["final"]],
    }


def main(folder: Path = Path("zoo")) -> None:
    folder.mkdir(exist_ok=True)
    for video in (True, False):
        for part, captions in lines(video).items():
            file = folder / f"prompts_{part}{'' if video else '_image'}.txt"
            file.write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()

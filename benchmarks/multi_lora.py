"""Compose two LoRAs of emoji-unet in four ways: scores of both concepts, and time.

python benchmarks/multi_lora.py benchmarks/results/emoji-unet-multi-lora.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accel
from demos.zoo import data
from demos.zoo.loras import centres_of_names, concepts, loaded

PAIR = ["trophy", "sepia"]
PROMPTS, STEPS = 16, 25


@contextmanager
def summed(pipe: Any) -> Iterator[None]:
    """One pass with both LoRAs' weights added."""
    pipe.set_adapters(PAIR)
    yield


@contextmanager
def switched(pipe: Any) -> Iterator[None]:
    """LoRA Switch: one LoRA a step, in turn."""
    original, step = pipe.scheduler.step, [0]

    def advance(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        step[0] += 1
        pipe.set_adapters(PAIR[step[0] % 2])
        return result

    advance.__signature__ = __import__("inspect").signature(original)
    pipe.scheduler.step = advance
    pipe.set_adapters(PAIR[0])
    try:
        yield
    finally:
        del pipe.scheduler.step


def cached(**settings: Any) -> Callable[[Any], Any]:
    """Cached Multi-LoRA."""

    @contextmanager
    def ours(pipe: Any) -> Iterator[None]:
        pipe.set_adapters(PAIR)
        with accel.patched(pipe, accel.CachedMultiLoRA(**settings)):
            yield

    return ours


def main() -> None:
    """Score every way on the same captions and seeds."""
    pipe, centres = loaded(), centres_of_names()
    held = [data.caption(*entry) for entry in data.combinations(video=False, held=True)][:PROMPTS]
    ways: dict[str, Callable[[Any], Any]] = {
        "summed weights": summed,
        "LoRA Switch": switched,
        "CachedMultiLoRA()": cached(),
        "CachedMultiLoRA(interval=1)": cached(interval=1),
    }
    rows = []
    for name, way in ways.items():
        with way(pipe):
            began = time.perf_counter()
            scores = concepts(pipe, held, centres, STEPS)
        rows.append({"name": name, **scores, "seconds": time.perf_counter() - began})
        print(rows[-1])
    content = {"command": f"python {' '.join(sys.argv)}", "prompts": PROMPTS, "steps": STEPS}
    Path(sys.argv[1]).write_text(json.dumps(content | {"composed": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The smallest random-weight pipeline of each family, built in memory, run from a prompt.

Random weights prove correctness, never quality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tiny_images import dit, flux, flux_cfg, pixart, qwen_image, sd3, sd15, sdxl
from tiny_parts import STEPS, Tiny, run
from tiny_videos import cogvideox, hunyuan_video, latte, ltx, mochi, wan21, wan22

__all__ = ["MATRIX", "STEPS", "TINY", "Tiny", "built", "left_behind", "run"]

TINY: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        flux,
        flux_cfg,
        sd3,
        pixart,
        wan21,
        wan22,
        hunyuan_video,
        cogvideox,
        ltx,
        qwen_image,
        mochi,
        latte,
        dit,
        sd15,
        sdxl,
    )
}

MATRIX: dict[tuple[str, str], str] = {}
"""(method, family) → what the contract tests saw; printed at the end of the run."""


SHARED: dict[str, Any] = {}


@functools.cache
def built(name: str) -> tuple[Tiny, torch.Tensor]:
    """One pipeline of a family for the whole session, and its untouched latents of seed 0."""
    tiny = TINY[name]()
    SHARED[name] = tiny.pipe
    return tiny, run(tiny)


def left_behind() -> list[str]:
    """Hooks and replaced steps that a test left on the shared pipelines."""
    found = [name for name, pipe in SHARED.items() if "step" in vars(pipe.scheduler)]
    for name, pipe in SHARED.items():
        for part in ("transformer", "transformer_2", "unet"):
            denoiser = getattr(pipe, part, None)
            for place, module in denoiser.named_modules() if denoiser is not None else ():
                if module._forward_pre_hooks or module._forward_hooks:
                    found.append(f"{name}: {place}")
    return found

"""FLUX Kontext: the tokens of a reference picture lie behind those of the picture that is made."""

from __future__ import annotations

import diffusers
import torch
from tiny_parts import Tiny
from tiny_pipelines import built


def kontext(rows: int = 16, columns: int = 32) -> Tiny:
    """Of the shared tiny FLUX; a reference of that many pixels, for a picture of 16 × 32."""
    tiny, _ = built("flux")
    pipe = diffusers.FluxKontextPipeline(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 32, "max_area": 512, "_auto_resize": False}
    reference = torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(0))
    return Tiny(pipe, tiny.call | size | {"image": reference})

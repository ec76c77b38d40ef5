"""Qwen-Image: joint-attention blocks, one denoiser call per guidance branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack, time_embedding

if TYPE_CHECKING:
    from accel.layout import Layout


def grid(arguments: Arguments) -> tuple[int, int, int]:
    """Of the first sample's first image: the one that is being made."""
    frames, rows, columns = arguments.get("img_shapes")[0][0]
    return (frames, rows, columns)


def resized(arguments: Arguments, layout: Layout) -> dict[str, Any]:
    """The shapes of each sample's images: the first is the one that is made."""
    shapes = [[layout.grid, *images[1:]] for images in arguments.get("img_shapes")]
    return {"img_shapes": shapes}


FAMILY = Family(
    name="qwen_image",
    stacks=(Stack("transformer_blocks", (ENCODER, HIDDEN)),),
    guidance="sequential",
    observer=time_embedding(),
    grid=grid,
    packed=2,
    text="first",
    resized=resized,
)

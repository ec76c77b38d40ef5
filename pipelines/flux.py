"""FLUX.1: joint-attention blocks, then single-stream blocks; both return (text, image)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack, modulated_input

if TYPE_CHECKING:
    from accel.layout import Layout


def grid(arguments: Arguments) -> tuple[int, int, int]:
    """From the coordinates of the image tokens, (tokens, 3): how many rows and columns differ.

    The first coordinate tells Kontext's reference pictures, which are not of the grid, from it.
    """
    ids = arguments.get("img_ids").reshape(-1, 3)
    rows, columns = ids[ids[:, 0] == 0][:, 1:].unbind(1)
    return (1, len(rows.unique()), len(columns.unique()))


def resized(arguments: Arguments, layout: Layout) -> dict[str, Any]:
    """Image coordinates (tokens, 3) of the live tokens."""
    return {"img_ids": layout.coordinates(arguments.get("img_ids"))}


FAMILY = Family(
    name="flux",
    stacks=(
        Stack("transformer_blocks", (ENCODER, HIDDEN)),
        Stack("single_transformer_blocks", (ENCODER, HIDDEN)),
    ),
    guidance="sequential",
    observer=modulated_input,
    grid=grid,
    packed=2,
    text="first",
    resized=resized,
    coordinates=True,
)

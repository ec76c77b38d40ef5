"""LTX-Video: cross-attention video blocks on packed latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accel.family import Arguments, Family, Stack, time_embedding

if TYPE_CHECKING:
    from accel.layout import Layout


def resized(arguments: Arguments, layout: Layout) -> dict[str, Any]:
    """Frames, rows and columns of the live latent."""
    assert layout.grid is not None  # stages are grids here
    frames, rows, columns = layout.grid
    return {"num_frames": frames, "height": rows, "width": columns}


FAMILY = Family(
    name="ltx",
    stacks=(Stack("transformer_blocks"),),
    observer=time_embedding(),
    resized=resized,
)

"""CogVideoX: joint-attention video blocks that return (video, text)."""

import math
from typing import Any

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack, time_embedding
from accel.layout import Layout
from accel.method import AccelError


def resized(arguments: Arguments, layout: Layout) -> dict[str, Any]:
    """Rotary tables (tokens, channels) of the live tokens; a token holds patch² latent pixels."""
    tables = arguments.get("image_rotary_emb")
    if tables is None:
        return {}
    assert layout.grid is not None  # stages are grids here
    count = len(tables[0])
    patch = math.isqrt(math.prod(layout.full) // count)
    if patch**2 * count != math.prod(layout.full):
        raise AccelError("CogVideoX 1.5 holds two frames in a token, which stages do not know")
    full, live = (
        (frames, rows // patch, columns // patch)
        for frames, rows, columns in (layout.full, layout.grid)
    )
    pick = Layout.resized(full, live).pick.to(tables[0].device)
    return {"image_rotary_emb": tuple(table[pick] for table in tables)}


FAMILY = Family(
    name="cogvideox",
    stacks=(Stack("transformer_blocks", (HIDDEN, ENCODER)),),
    observer=time_embedding(),
    frames_first=True,
    text="first",
    resized=resized,
)

"""Latte: spatial and temporal blocks alternate, with a reshape between any two."""

from typing import Any

from accel.family import Family, Stack, by_shape, time_embedding


def to_temporal(spatial: Any, like: Any) -> Any:
    """(batch·frames, tokens, channels) → (batch·tokens, frames, channels), as `like` has it."""
    if spatial.shape == like.shape:
        return spatial
    frames, channels = like.shape[1], like.shape[2]
    by_frame = spatial.reshape(-1, frames, spatial.shape[1], channels)
    return by_frame.transpose(1, 2).reshape(-1, frames, channels)


FAMILY = Family(
    name="latte",
    stacks=(Stack("transformer_blocks"), Stack("temporal_transformer_blocks")),
    observer=time_embedding("timestep"),
    interleaved=True,
    relayout=to_temporal,
    resized=by_shape,
)

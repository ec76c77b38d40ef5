"""Wan 2.1 and 2.2: cross-attention video blocks, one denoiser call per guidance branch."""

from accel.family import Family, Stack, by_shape, time_embedding

FAMILY = Family(
    name="wan",
    stacks=(Stack("blocks"),),
    guidance="sequential",
    observer=time_embedding(),
    resized=by_shape,
)

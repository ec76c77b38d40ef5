"""PixArt-alpha and PixArt-sigma: cross-attention blocks, learned variance."""

from accel.family import Family, Stack, by_shape, time_embedding

FAMILY = Family(
    name="pixart",
    stacks=(Stack("transformer_blocks"),),
    observer=time_embedding("timestep"),
    resized=by_shape,
)

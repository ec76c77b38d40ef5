"""PixArt-alpha and PixArt-sigma: cross-attention blocks, learned variance."""

from accel.family import Family, Stack, time_embedding

FAMILY = Family(
    name="pixart",
    stacks=(Stack("transformer_blocks"),),
    observer=time_embedding("timestep"),
)

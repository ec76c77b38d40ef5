"""LTX-Video: cross-attention video blocks on packed latents."""

from accel.family import Family, Stack, time_embedding

FAMILY = Family(
    name="ltx",
    stacks=(Stack("transformer_blocks"),),
    observer=time_embedding(),
)

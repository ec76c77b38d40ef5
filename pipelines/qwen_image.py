"""Qwen-Image: joint-attention blocks, one denoiser call per guidance branch."""

from accel.family import ENCODER, HIDDEN, Family, Stack, time_embedding

FAMILY = Family(
    name="qwen_image",
    stacks=(Stack("transformer_blocks", (ENCODER, HIDDEN)),),
    guidance="sequential",
    observer=time_embedding(),
)

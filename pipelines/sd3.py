"""Stable Diffusion 3 and 3.5: joint-attention blocks; the last returns no text stream."""

from accel.family import ENCODER, HIDDEN, Family, Stack, by_shape, modulated_input

FAMILY = Family(
    name="sd3",
    stacks=(Stack("transformer_blocks", (ENCODER, HIDDEN)),),
    observer=modulated_input,
    text="last",
    resized=by_shape,
)

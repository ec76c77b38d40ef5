"""Mochi: joint-attention video blocks that return (video, text)."""

from accel.family import ENCODER, HIDDEN, Family, Stack, by_shape, modulated_input

FAMILY = Family(
    name="mochi",
    stacks=(Stack("transformer_blocks", (HIDDEN, ENCODER)),),
    observer=modulated_input,
    text="last",
    resized=by_shape,
)

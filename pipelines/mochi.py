"""Mochi: joint-attention video blocks that return (video, text)."""

from accel.family import ENCODER, HIDDEN, Family, Stack, modulated_input

FAMILY = Family(
    name="mochi",
    stacks=(Stack("transformer_blocks", (HIDDEN, ENCODER)),),
    observer=modulated_input,
)

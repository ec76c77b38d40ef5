"""FLUX.1: joint-attention blocks, then single-stream blocks; both return (text, image)."""

from accel.family import ENCODER, HIDDEN, Family, Stack, modulated_input

FAMILY = Family(
    name="flux",
    stacks=(
        Stack("transformer_blocks", (ENCODER, HIDDEN)),
        Stack("single_transformer_blocks", (ENCODER, HIDDEN)),
    ),
    guidance="sequential",
    observer=modulated_input,
)

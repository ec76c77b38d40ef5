"""FLUX.1: joint-attention blocks, then single-stream blocks; both return (text, image)."""

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack, modulated_input


def grid(arguments: Arguments) -> tuple[int, int, int]:
    """From the coordinates of the image tokens, (tokens, 3): the last row and column."""
    rows, columns = arguments.get("img_ids").reshape(-1, 3)[-1, 1:].tolist()
    return (1, int(rows) + 1, int(columns) + 1)


FAMILY = Family(
    name="flux",
    stacks=(
        Stack("transformer_blocks", (ENCODER, HIDDEN)),
        Stack("single_transformer_blocks", (ENCODER, HIDDEN)),
    ),
    guidance="sequential",
    observer=modulated_input,
    grid=grid,
    packed=2,
)

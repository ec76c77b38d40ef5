"""Qwen-Image: joint-attention blocks, one denoiser call per guidance branch."""

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack, time_embedding


def grid(arguments: Arguments) -> tuple[int, int, int]:
    """Of the first sample's first image: the one that is being made."""
    frames, rows, columns = arguments.get("img_shapes")[0][0]
    return (frames, rows, columns)


FAMILY = Family(
    name="qwen_image",
    stacks=(Stack("transformer_blocks", (ENCODER, HIDDEN)),),
    guidance="sequential",
    observer=time_embedding(),
    grid=grid,
    packed=2,
)

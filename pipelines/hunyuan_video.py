"""HunyuanVideo: joint-attention blocks, then single-stream blocks; both return (video, text)."""

from accel.family import ENCODER, HIDDEN, Family, Stack, by_shape, modulated_input

FAMILY = Family(
    name="hunyuan_video",
    stacks=(
        Stack("transformer_blocks", (HIDDEN, ENCODER)),
        Stack("single_transformer_blocks", (HIDDEN, ENCODER)),
    ),
    guidance="sequential",
    observer=modulated_input,
    text="last",
    resized=by_shape,
)

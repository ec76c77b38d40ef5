"""CogVideoX: joint-attention video blocks that return (video, text)."""

from accel.family import ENCODER, HIDDEN, Family, Stack, time_embedding

FAMILY = Family(
    name="cogvideox",
    stacks=(Stack("transformer_blocks", (HIDDEN, ENCODER)),),
    observer=time_embedding(),
    frames_first=True,
)

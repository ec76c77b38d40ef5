"""DiT: class-conditional blocks; the timestep embedding lives inside each block's norm."""

from typing import Any

from accel.family import HIDDEN, Arguments, Family, Stack


def modulated_by_class(block: Any, arguments: Arguments) -> Any:
    """Block 0's input after its own timestep and class modulation, (batch, tokens, channels)."""
    hidden = arguments.get(HIDDEN)
    return block.norm1(
        hidden,
        arguments.get("timestep"),
        arguments.get("class_labels"),
        hidden_dtype=hidden.dtype,
    )[0]


FAMILY = Family(
    name="dit",
    stacks=(Stack("transformer_blocks"),),
    observer=modulated_by_class,
    cond_first=True,
)

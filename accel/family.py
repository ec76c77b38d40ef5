"""What we know about one model architecture, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from accel.method import AccelError

if TYPE_CHECKING:
    from accel.layout import Layout

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, looked up by parameter name whether or not it was positional."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """The value passed for `name`, or None."""
        if name in self.kwargs:
            return self.kwargs[name]
        if name in self.names:
            place = self.names.index(name)
            if place < len(self.args):
                return self.args[place]
        return None


Observer = Callable[[Any, Arguments], Any]
"""`observer(block_0, its arguments)` → the tensor that TeaCache watches."""


def modulated_input(block: Any, arguments: Arguments) -> Any:
    """Block 0's normalised input after the timestep modulation, (batch, tokens, channels)."""
    return block.norm1(arguments.get(HIDDEN), emb=arguments.get("temb"))[0]


def time_embedding(name: str = "temb") -> Observer:
    """The (projected) timestep embedding that block 0 receives as argument `name`."""

    def observe(_: Any, arguments: Arguments) -> Any:
        return arguments.get(name)

    return observe


@dataclass(frozen=True)
class Stack:
    """One list of blocks.

    `outputs` names the streams that a block returns, in order; one name means a bare tensor, and
    None means "learn it at the first forward". Streams enter as arguments of the same names, but
    the hidden states as argument `hidden`. `wrapped`: a bare tensor comes as a tuple of one.
    `reshapes`: blocks change the shape of the hidden states, so that a skipped one must return
    something of the right shape, whatever its values.
    """

    name: str
    outputs: tuple[str, ...] | None = (HIDDEN,)
    hidden: str = HIDDEN
    wrapped: bool = False
    reshapes: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture: its stacks in calling order and how its pipelines do guidance.

    `guidance`: "batched" (both branches in one call) or "sequential" (one call each).
    `interleaved`: blocks of the stacks alternate (Latte) instead of following each other.
    `relayout(x, like)`: bring a tensor in the first block's layout into that of `like`.
    `blocks(denoiser)`: the chain, where it is not made of lists; `spans(denoiser)`: spans of a
    U-Net's chain that lie inside each skip connection, outermost first. `grid(arguments)`: frames,
    rows and columns of tokens, where the latent's shape does not tell; tokens of reference pictures
    come after them and do not count. `frames_first`: latents are
    (batch, frames, channels, height, width); `packed`: latent pixels a side that a token's channels
    hold; `cond_first`: batched guidance puts the conditional half first. `text`: where joint
    attention puts it, before or behind the picture; None where it has none or that is not known.
    `resized(arguments, layout)`: arguments, other than the latent, that must change when only the
    live places of a `Layout` are computed; None where that is not known. `coordinates`: tokens
    carry coordinates, so that any set of them can be computed. `predictions`: how many a call makes
    (2: sound too).
    """

    name: str
    stacks: tuple[Stack, ...] = ()
    guidance: Literal["batched", "sequential"] = "batched"
    observer: Observer | None = None
    interleaved: bool = False
    relayout: Callable[[Any, Any], Any] | None = None
    latent: str = HIDDEN
    blocks: Callable[[Any], list[tuple[Any, Stack]]] | None = None
    spans: Callable[[Any], list[tuple[int, int]]] | None = None
    grid: Callable[[Arguments], tuple[int, int, int]] | None = None
    frames_first: bool = False
    packed: int = 1
    cond_first: bool = False
    text: Literal["first", "last"] | None = None
    resized: Callable[[Arguments, Layout], dict[str, Any]] | None = None
    coordinates: bool = False
    predictions: int = 1

    def chain(self, denoiser: Any) -> list[tuple[Any, Stack]]:
        """The blocks in calling order, each with its stack."""
        if self.blocks is not None:
            return self.blocks(denoiser)
        lists = [
            [(block, stack) for block in getattr(denoiser, stack.name)] for stack in self.stacks
        ]
        if self.interleaved:
            return [entry for group in zip(*lists, strict=True) for entry in group]
        return [entry for blocks in lists for entry in blocks]


def by_shape(arguments: Arguments, layout: Layout) -> dict[str, Any]:
    """`Family.resized` of a denoiser that sees its size by the latent's shape."""
    return {}


_LATENT_NAMES = (HIDDEN, "sample", "x")
_LIST_NAMES = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "visual_transformer_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "single_blocks",
    "blocks",
    "layers",
)
"""Lists of blocks that take the hidden states first, in the order in which models call them."""


def detect(denoiser: Any) -> Family:
    """Describe an unregistered denoiser by its block lists.

    Without two blocks it has no chain, and methods that skip whole calls are for it. Refused with
    the reason where even the latent cannot be told among its arguments.
    """
    name = type(denoiser).__name__
    taken = tuple(inspect.signature(denoiser.forward).parameters)
    latent = next((each for each in _LATENT_NAMES if each in taken), None)
    if latent is None:
        raise AccelError(
            f"{name} takes none of {', '.join(_LATENT_NAMES)}, so that its latent is not known; "
            "describe the model by a Family in accel.pipelines"
        )
    found = [each for each in _LIST_NAMES if len(getattr(denoiser, each, ())) > 0]
    if sum(len(getattr(denoiser, each)) for each in found) < 2:
        found = []
    stacks = tuple(
        Stack(each, outputs=None, hidden=_first_taken(getattr(denoiser, each)[0])) for each in found
    )
    return Family(name=name, stacks=stacks, latent=latent)


def _first_taken(block: Any) -> str:
    """The argument in which a block takes the hidden states."""
    taken = tuple(inspect.signature(block.forward).parameters)
    return HIDDEN if HIDDEN in taken else taken[0]

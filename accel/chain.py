"""A denoiser's blocks in calling order, and the streams of tensors that run through them."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack
from accel.site import Streams

logger = logging.getLogger(__name__)


class Chain:
    """The blocks of one denoiser.

    Streams are always in the order of `streams`, hidden states first, whatever the order in which
    blocks take and return them. For stacks that no family describes, that order is learned at the
    first forward: what the next block receives is, by identity, what this one returned.
    """

    def __init__(self, module: Any, family: Family) -> None:
        entries = family.chain(module)
        self.blocks: list[Any] = [block for block, _ in entries]
        self.streams = _streams([stack for _, stack in entries])
        self._family = family
        self._owner = type(module).__name__
        self.stacks = [stack for _, stack in entries]
        self._names = [
            tuple(HIDDEN if name == stack.hidden else name for name in parameters(block))
            for block, stack in entries
        ]
        self._shapes: dict[int, torch.Size] = {}
        self._learned: dict[str, tuple[str, ...]] = {}
        self._last: tuple[str, tuple[Any, ...]] | None = None
        self._warned = False

    def arguments(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call of block `index`."""
        return Arguments(self._names[index], args, kwargs)

    def inputs(self, arguments: Arguments) -> Streams:
        """The streams that a block receives."""
        return tuple(arguments.get(name) for name in self.streams)

    def outputs(self, index: int, output: Any) -> Streams:
        """What block `index` returned, as streams."""
        values = (output,) if isinstance(output, torch.Tensor) else output
        by_name = dict(zip(self._order(index), values, strict=False))
        return tuple(by_name.get(name) for name in self.streams)

    def pack(self, index: int, streams: Streams) -> Any:
        """Streams in the form that block `index` returns."""
        by_name = dict(zip(self.streams, streams, strict=True))
        values = tuple(by_name[name] for name in self._order(index))
        return values[0] if len(values) == 1 and not self.stacks[index].wrapped else values

    def pass_on(self, index: int, streams: Streams) -> Any:
        """What block `index` returns where it is skipped and what follows it too."""
        hidden = streams[0]
        if self.stacks[index].reshapes and hidden is not None:
            shape = (hidden.shape[0], *self._shapes[index][1:])
            streams = (hidden.new_empty(shape), *streams[1:])  # FreeU writes into it
        return self.pack(index, streams)

    def keeps_shape(self, index: int) -> bool:
        """Whether block `index` returns hidden states of the shape it took."""
        return not self.stacks[index].reshapes

    def known(self, index: int) -> bool:
        """Whether the order of what block `index` returns is known."""
        stack = self.stacks[index]
        return stack.outputs is not None or stack.name in self._learned

    def _order(self, index: int) -> tuple[str, ...]:
        stack = self.stacks[index]
        return stack.outputs or self._learned[stack.name]

    def learn(self, index: int, arguments: Arguments, output: Any) -> Any:
        """Watch a computed block: shapes, and the order of an undescribed stack's streams."""
        if self.stacks[index].reshapes:
            hidden = self.outputs(index, output)[0]
            assert hidden is not None
            self._shapes[index] = hidden.shape
        if self.known(index):
            return output
        name = self.stacks[index].name
        values = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        previous, self._last = self._last, (name, values)
        if previous is None or previous[0] != name:
            return output
        order = tuple(
            next((stream for stream in self.streams if arguments.get(stream) is value), "")
            for value in previous[1]
        )
        if HIDDEN in order and "" not in order:
            self._learned[name] = order
        elif not self._warned:
            self._warned = True
            logger.warning(
                "%s: the blocks of %s do not hand their outputs on unchanged; nothing is cached",
                self._owner,
                name,
            )
        return output

    def forget(self) -> None:
        """A new run begins: outputs of the last one are no predecessors."""
        self._last = None

    def relayout(self, streams: Streams, like: Any) -> Streams:
        """Streams recorded at a span's first block, in the layout of `like`."""
        if self._family.relayout is None or streams[0] is None or streams[0].shape == like.shape:
            return streams
        return (self._family.relayout(streams[0], like), *streams[1:])


def parameters(module: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def _streams(stacks: list[Stack]) -> tuple[str, ...]:
    """All streams of a chain, hidden states first."""
    named = {name for stack in stacks for name in (stack.outputs or (HIDDEN, ENCODER))}
    return (HIDDEN, *sorted(named - {HIDDEN}))

"""A denoiser's blocks in calling order, and the streams of tensors that run through them."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import Any

import torch

from accel.family import ENCODER, HIDDEN, Arguments, Family, Stack
from accel.site import Streams

logger = logging.getLogger(__name__)


class Chain:
    """The blocks of one denoiser.

    Streams are always in the order of `streams`, hidden states first, whatever the order in which
    blocks take and return them. For stacks that no family describes, that order is learned at the
    first forward: what the next block receives is, by identity, what this one returned; of one
    output that was changed on the way, the stream that is left over. Where a later stack works on
    more tokens (text joined to the picture), it is learned at which end the picture lies.
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
        self._learning = any(stack.outputs is None for stack in self.stacks)
        self.studied = not self._learning
        """Whether one call went through that sites had no part in, for the streams to be known."""
        self._last: tuple[int, tuple[Any, ...]] | None = None
        self._picture_last: bool | None = None
        """Where more tokens than block 0's are worked on: whether its own are the last of them."""
        self._warned: set[str] = set()

    def arguments(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call of block `index`."""
        hidden = self.stacks[index].hidden
        if hidden in kwargs:
            kwargs = {HIDDEN if name == hidden else name: kwargs[name] for name in kwargs}
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
        return self.stacks[index].outputs is not None

    def _order(self, index: int) -> tuple[str, ...]:
        return self.stacks[index].outputs or ()

    def learn(self, index: int, arguments: Arguments, output: Any) -> Any:
        """Watch a computed block: shapes, and the streams of a stack that no family describes."""
        if self.stacks[index].reshapes:
            hidden = self.outputs(index, output)[0]
            assert hidden is not None
            self._shapes[index] = hidden.shape
        if not self._learning:
            return output
        previous, self._last = self._last, None
        if index + 1 < len(self.blocks):
            self._last = (index, (output,) if isinstance(output, torch.Tensor) else tuple(output))
        if isinstance(output, torch.Tensor):
            self._describe(index, (HIDDEN,))
        if previous is not None and previous[0] == index - 1:
            if self.stacks[index].name != self.stacks[index - 1].name:
                self._learn_junction(index, previous[1], arguments.get(HIDDEN))
            elif not self.known(index):
                self._learn_order(index, previous[1], arguments)
        return output

    def _describe(self, index: int, order: tuple[str, ...], wrapped: bool = False) -> None:
        """What the blocks of the stack of block `index` return is known now."""
        if not self.known(index):
            old = self.stacks[index]
            new = replace(old, outputs=order, wrapped=wrapped)
            self.stacks = [new if stack is old else stack for stack in self.stacks]
            self.streams += tuple(each for each in order if each not in self.streams)

    def _learn_order(self, index: int, returned: tuple[Any, ...], taken: Arguments) -> None:
        """Which stream each value `returned` by a block is, from what the next one has `taken`."""
        given = dict(zip(taken.names, taken.args, strict=False)) | taken.kwargs
        names = [
            next((name for name, value in given.items() if value is each), "") for each in returned
        ]
        if names.count("") == 1:
            place = names.index("")
            left = [stream for stream in self.streams if stream not in names]
            alike = [each for each in left if _shape(given.get(each)) == _shape(returned[place])]
            names[place] = alike[0] if len(alike) == 1 else ""
        if HIDDEN in names and "" not in names:
            self._describe(index, tuple(names), wrapped=len(names) == 1)
        else:
            self._warn(index, "the blocks of %s do not hand their outputs on; nothing is cached")

    def _learn_junction(self, index: int, returned: tuple[Any, ...], taken: Any) -> None:
        """At which end of what block `index` has `taken` the last stack's hidden states lie."""
        named = dict(zip(self._order(index - 1), returned, strict=False))
        before = named.get(HIDDEN)
        if before is None or taken is None or before.shape == taken.shape:
            return
        if self._picture_last is not None:
            return
        count = before.shape[1]
        if torch.equal(taken[:, :count], before):
            self._picture_last = False
        elif torch.equal(taken[:, -count:], before):
            self._picture_last = True
        else:
            self._warn(
                index, "%s does not show where the picture's tokens lie; nothing is cached past it"
            )

    def _warn(self, index: int, message: str) -> None:
        name = self.stacks[index].name
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(f"%s: {message}", self._owner, name)

    def forget(self) -> None:
        """A new run begins: outputs of the last one are no predecessors."""
        self._last = None

    def relayout(self, streams: Streams, like: Any) -> Streams:
        """Streams recorded at a span's first block, in the layout of `like`.

        Tokens that joined since then are zero, so that a residual holds them whole.
        """
        hidden = streams[0]
        if hidden is None or hidden.shape == like.shape:
            return streams
        if self._family.relayout is not None:
            return (self._family.relayout(hidden, like), *streams[1:])
        more = like.shape[1] - hidden.shape[1]
        if self._picture_last is None or more < 0:
            return streams
        joined = hidden.new_zeros(hidden.shape[0], more, *hidden.shape[2:])
        parts = (joined, hidden) if self._picture_last else (hidden, joined)
        return (torch.cat(parts, dim=1), *streams[1:])


def parameters(module: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    plain = getattr(module, "_orig_mod", module)  # torch.compile's takes all
    return tuple(inspect.signature(plain.forward).parameters)


def _streams(stacks: list[Stack]) -> tuple[str, ...]:
    """All streams of a chain, hidden states first."""
    named = {name for stack in stacks for name in (stack.outputs or (HIDDEN, ENCODER))}
    return (HIDDEN, *sorted(named - {HIDDEN}))


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)

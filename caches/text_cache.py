"""Text cache: keys and values of a prompt that does not change are computed once a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.branch_states import same_memory
from accel.denoiser import Denoiser
from accel.hooks import override
from accel.method import Handle
from accel.sublayer import cross_attention

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("caption_projection", "context_embedder", "condition_embedder.text_embedder")
BRANCHES = 4


@dataclass(frozen=True)
class TextCache:
    """Compute what depends on the prompt alone once a run: exact, bit for bit.

    Keys and values of cross-attention, and the projection of the text before the blocks, are
    repeated while their input is the very same unchanged memory (inference mode does not tell
    whether it is, and repeats nothing). Combines with every other method. Not for joint attention,
    where the text changes from block to block. `accel.patch` attaches it beside any other method,
    unless a `memory` budget is given: it holds two tensors of the text's length a block and branch
    (Wan 14B: 0.4 GB a branch, beside 28 GB of weights). In blocks under `torch.compile` it does
    nothing and breaks no graph.
    """

    slot: ClassVar[str] = "text"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the projections of the text; raises when the denoiser has none."""
        layers = cross_attention(denoiser, "TextCache")
        modules = [*_projections(denoiser.module)]
        modules += [part for each in layers for part in _keys_and_values(each.modules[0])]
        handles: list[Handle] = []
        try:
            for module in modules:
                handles.append(denoiser.follow(partial(_memoise, denoiser, module)))
        except BaseException:
            Handle.together(handles).remove()
            raise
        return Handle.together(handles)


def _projections(module: Any) -> Iterator[Any]:
    for path in PROJECTIONS:
        part = module
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is not None:
            yield part


def _keys_and_values(attention: Any) -> Iterator[Any]:
    """Below LoRA's layers, whose own share depends on the adapters of the moment."""
    for name in ("to_k", "to_v"):
        part = getattr(attention, name, None)
        if part is not None:
            yield getattr(part, "base_layer", part)


class _Memory:
    """Repeats a module's output while module and input are as they were."""

    def __init__(self, denoiser: Denoiser, module: Any) -> None:
        self.denoiser, self.module = denoiser, module
        self.known: list[tuple[Tensor, tuple[int, ...], Any]] = []
        self.helps = False

    def forget(self) -> None:
        """A run is over."""
        self.known.clear()
        self.helps = False

    def call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module is called."""
        if torch.compiler.is_compiling() or self.denoiser.forward is None:
            return original(*args, **kwargs)
        if len(args) != 1 or kwargs or args[0].is_inference():
            return original(*args, **kwargs)
        (text,) = args
        weight = getattr(self.module, "weight", None)
        version = (text._version, id(weight), 0 if weight is None else weight._version)
        for seen, then, output in self.known:
            if then == version and same_memory(seen, text):
                self.helps = True
                return output
        output = original(text)
        if len(self.known) == BRANCHES and not self.helps:  # another text at every call
            return output
        if not getattr(output, "requires_grad", False):
            self.known.append((text, version, output))
            del self.known[:-BRANCHES]
        return output


def _memoise(denoiser: Denoiser, module: Any) -> Callable[[], None]:
    """Repeat a module's output while it gets the same tensor; returns the undo."""
    memory = _Memory(denoiser, module)
    undo = override(module, {"__call__": memory.call})
    denoiser.forgetting.append(memory.forget)

    def remove() -> None:
        denoiser.forgetting.remove(memory.forget)
        undo()

    return remove

"""Text cache: keys and values of a prompt that does not change are computed once a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

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
    where the text changes from block to block. Holds two tensors of the text's length a block and
    branch, which for large models (Wan 14B: 0.4 GB a branch) costs more than it saves; it pays
    where text is long beside the picture. Leave it out under `torch.compile`: compiled blocks
    would break their graph at each projection.
    """

    slot: ClassVar[str] = "text"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the projections of the text; raises when the denoiser has none."""
        layers = cross_attention(denoiser, "TextCache")
        modules = [*_projections(denoiser.module)]
        modules += [part for each in layers for part in _keys_and_values(each.modules[0])]
        return Handle.together([denoiser.follow(partial(_memoise, denoiser, m)) for m in modules])


def _projections(module: Any) -> Iterator[Any]:
    for path in PROJECTIONS:
        part = module
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is not None:
            yield part


def _keys_and_values(attention: Any) -> Iterator[Any]:
    for name in ("to_k", "to_v"):
        part = getattr(attention, name, None)
        if part is not None:
            yield part


def _memoise(denoiser: Denoiser, module: Any) -> Callable[[], None]:
    """Repeat a module's output while it gets the same tensor; returns the undo."""
    known: list[tuple[Tensor, int, Any]] = []

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if denoiser.forward is None or len(args) != 1 or kwargs or args[0].is_inference():
            return original(*args, **kwargs)
        (text,) = args
        for seen, version, output in known:
            if version == text._version and _same_memory(seen, text):
                return output
        version, output = text._version, original(text)
        if not getattr(output, "requires_grad", False):
            known.append((text, version, output))
            del known[:-BRANCHES]
        return output

    denoiser.forgetting.append(known.clear)
    undo = override(module, {"__call__": call})

    def remove() -> None:
        denoiser.forgetting.remove(known.clear)
        undo()

    return remove


def _same_memory(seen: Tensor, text: Tensor) -> bool:
    """Whether both are views of the same memory; `seen` keeps it from being used anew."""
    return seen is text or (
        seen.data_ptr() == text.data_ptr()
        and seen.dtype == text.dtype
        and seen.shape == text.shape
        and seen.stride() == text.stride()
    )

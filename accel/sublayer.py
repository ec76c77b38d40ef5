"""The attention and feed-forward layers inside a denoiser's blocks, and calls of them.

What is cached of a sublayer is its output before the block's gate: norms, modulation and gates of
a skipped step stay live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accel.denoiser import Denoiser
from accel.hooks import is_compiled_whole, override
from accel.method import AccelError, Handle
from accel.signals import SpanSignals
from accel.site import Approximator, Branch, Computed, Forward, Policy, Shared, Site, Streams

if TYPE_CHECKING:
    from torch import Tensor

    from accel.chain import Chain

KINDS = ("self", "temporal", "cross", "mlp", "fused")
_ATTENTION = ("attn", "attn1", "attn2", "attention")
_FUSED = ("proj_mlp", "attn", "proj_out")
_MLP = ("ff", "ff_context", "ffn", "mlp", "img_mlp", "txt_mlp", "feed_forward")


@dataclass(frozen=True)
class Sublayer:
    """One layer of block number `block`.

    `kind`: "self" (also spatial and joint attention), "temporal", "cross", "mlp", or "fused" for
    the attention and MLP that a single-stream block projects together. `modules`, the children
    `names` of `parent` as they are now (a LoRA exchanges them), are called one after the other; the
    output is the last one's. A layer that a block calls twice is cached at its first call.
    """

    kind: str
    block: int
    parent: Any
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of the module whose output it is."""
        return self.names[-1]

    @property
    def modules(self) -> tuple[Any, ...]:
        """The modules of now."""
        return tuple(getattr(self.parent, name) for name in self.names)


Policies = Callable[[Branch, Sequence[Sublayer]], Sequence[Policy]]
"""Makes the policies of one branch and run, one for each sublayer; they may share state."""


def sublayers(chain: Chain, owner: str) -> list[Sublayer]:
    """All sublayers in calling order; raises when a block has none that is known."""
    found: list[Sublayer] = []
    for index, (block, stack) in enumerate(zip(chain.blocks, chain.stacks, strict=True)):
        for part in getattr(block, "transformer_blocks", (block,)):
            if getattr(part, "_chunk_size", None) is not None:
                raise AccelError(
                    f"{owner}: feed-forward chunking is on, which calls a layer several times a "
                    "step; disable_forward_chunking() first"
                )
            found += _of_block(getattr(part, "_orig_mod", part), index, "temporal" in stack.name)
    return found


def _of_block(block: Any, index: int, temporal: bool) -> list[Sublayer]:
    children = dict(block.named_children())
    if set(_FUSED) <= set(children):
        return [Sublayer("fused", index, block, _FUSED)]
    found = []
    for name in (*_ATTENTION, *_MLP):
        if children.get(name) is None:
            continue
        kind = "mlp" if name in _MLP else "temporal" if temporal else "self"
        if name == "attn2" and "attn1" in children:
            kind = "cross"
        found.append(Sublayer(kind, index, block, (name,)))
    return found


def cross_attention(denoiser: Denoiser, method: str) -> list[Sublayer]:
    """The layers that attend to the prompt; raises when there are none."""
    owner = type(denoiser.module).__name__
    found = [layer for layer in sublayers(denoiser.chain, owner) if layer.kind == "cross"]
    if not found:
        raise AccelError(
            f"{method} needs cross-attention to the prompt; {owner} has none that is known"
        )
    return found


def cache_sublayers(
    denoiser: Denoiser,
    policies: Policies,
    reuse: Approximator,
    method: str,
    kinds: Sequence[str] = KINDS,
) -> Handle:
    """Let `policies` skip the layers of `kinds` one by one; `reuse` forecasts their outputs.

    Raises `AccelError` when the denoiser's blocks have no such layers.
    """
    owner = type(denoiser.module).__name__
    layers = [layer for layer in sublayers(denoiser.chain, owner) if layer.kind in kinds]
    if not layers:
        raise AccelError(
            f"{method} needs {' or '.join(kinds)} layers inside transformer blocks; {owner} has "
            "none that are known"
        )
    if is_compiled_whole(denoiser.module):
        raise AccelError(
            f"{method} skips layers inside blocks, but {denoiser.name} was compiled as a whole; "
            "EasyCache works on whole calls"
        )
    shared, handles = Shared(lambda branch: policies(branch, layers)), list[Handle]()
    try:
        for index, layer in enumerate(layers):
            site = Site(0, 0, partial(shared.policy, index), reuse, keeps_output=True)
            handles.append(denoiser.add(site, _Calls(denoiser, site, layer).hook))
    except BaseException:
        Handle.together(handles).remove()
        raise
    return Handle.together(handles)


class _Calls:
    """Runs or skips one sublayer."""

    def __init__(self, denoiser: Denoiser, site: Site, layer: Sublayer) -> None:
        self.denoiser, self.site, self.layer = denoiser, site, layer
        self.shapes: dict[int, Any] = {}

    def hook(self) -> Callable[[], None]:
        """Override the modules' calls; returns the undo."""
        handles: list[Handle] = []
        try:
            for position, module in enumerate(self.layer.modules):
                call = {"__call__": partial(self.call, position)}
                handles.append(Handle(override(module, call)))
        except BaseException:
            Handle.together(handles).remove()
            raise
        return Handle.together(handles).remove

    def call(self, position: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Module number `position` is called."""
        forward = self.denoiser.forward
        if forward is None:
            return run(*args, **kwargs)
        number = self.denoiser.number(self.site)
        if position == 0 and number in forward.inputs:
            return run(*args, **kwargs)  # called again, for the text (CogView4)
        last = position == len(self.layer.modules) - 1
        if position == 0:
            hidden = args[0] if args else kwargs["hidden_states"]
            text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
            forward.inputs[number] = (hidden, text, mask)
            signals = SpanSignals(self.denoiser, forward, hidden)
            forward.blocks += 1
            forward.blocks_run += not forward.decide(number, signals)
        seen = SpanSignals(self.denoiser, forward, forward.inputs[number][0])
        if number not in forward.skipping:
            output = run(*args, **kwargs)
            if last:
                kept = output if isinstance(output, tuple) else (output,)
                kept = forward.remember(number, seen, Computed(forward.inputs[number], kept, kept))
                output = kept if isinstance(output, tuple) else kept[0]
            self.shapes[position] = _shape(output)
            return output
        if not last:
            return _placeholder(self.shapes[position], forward.inputs[number][0])
        compute = partial(self._on_tokens, forward, run, args, kwargs)
        forecast = forward.forecast(number, seen, compute)
        return forecast[0] if isinstance(self.shapes[position], torch.Size) else forecast

    def _on_tokens(
        self,
        forward: Forward,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: Tensor,
    ) -> Streams:
        """Run the layer on the tokens (batch, count) of its hidden states alone."""
        hidden = args[0] if args else kwargs["hidden_states"]
        chosen = hidden.gather(1, indices.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        forward.blocks_run += indices.shape[1] / hidden.shape[1]
        if args:
            return (run(chosen, *args[1:], **kwargs),)
        return (run(**{**kwargs, "hidden_states": chosen}),)


def _shape(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if value is None else value.shape for value in output)
    return output.shape


def _placeholder(shape: Any, like: Any) -> Any:
    """Something of the right shape; what follows in the fused layer is skipped too."""
    if not isinstance(shape, torch.Size):
        return tuple(None if each is None else _placeholder(each, like) for each in shape)
    return like.new_zeros(()).expand(shape)

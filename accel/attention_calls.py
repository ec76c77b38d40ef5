"""The attention layers of a denoiser, and letting something stand in for softmax attention there.

diffusers models reach attention in two ways: through its dispatcher (FLUX, Wan, LTX, HunyuanVideo,
Qwen-Image, …) or by `scaled_dot_product_attention` in their processor (SD3, PixArt, CogVideoX,
Mochi, Latte, DiT, U-Nets, users' own). Both end in `scaled_dot_product_attention` while a layer's
processor runs, and that is what is intercepted, in the patched processors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from accel.hooks import native_dispatch, override, plain_class
from accel.method import AccelError, Handle
from accel.sublayer import sublayers

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """An attention module by its name in the denoiser, such as `transformer_blocks.0.attn`."""

    name: str
    module: Any

    @property
    def crosses(self) -> bool:
        """Whether the layer attends to other tokens than its own, as far as the module says."""
        return bool(getattr(self.module, "is_cross_attention", False))


@dataclass(frozen=True)
class AttentionCall:
    """One attention: tensors are (batch, heads, tokens, head_dim); masks are torch's.

    `plain()` is what the model would have computed.
    """

    layer: AttentionLayer
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    plain: Callable[[], Tensor]

    def over(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The same with other tensors; `plain` stays what it was."""
        return replace(self, query=query, key=key, value=value)


Attend = Callable[[AttentionCall], "Tensor"]


def attention_layers(denoiser: Any) -> list[AttentionLayer]:
    """Every module of a denoiser that attends by a processor, in the order of definition."""
    return [
        AttentionLayer(name, module)
        for name, module in denoiser.named_modules()
        if callable(getattr(module, "processor", None))
    ]


def self_attention(denoiser: Denoiser, method: str) -> list[AttentionLayer]:
    """The layers of the blocks whose tokens attend to each other; raises when none is known."""
    owner = type(denoiser.module).__name__
    own = [each for each in sublayers(denoiser.chain, owner) if each.kind in ("self", "fused")]
    wanted = {id(module) for each in own for module in each.modules}
    layers = [each for each in attention_layers(denoiser.module) if id(each.module) in wanted]
    if not layers:
        raise AccelError(f"{method} needs self-attention layers; {owner} has none that are known")
    return layers


def intercept(
    denoiser: Denoiser,
    layers: Sequence[AttentionLayer],
    attend: Attend,
    forget: Callable[[], None] | None = None,
) -> Handle:
    """Let `attend` compute the attention of some layers; `forget` is called between runs."""

    def hook() -> Callable[[], None]:
        interception = Interception(layers, attend)
        calls = [interception.refresh, *([forget] if forget is not None else [])]
        handles = [denoiser.when_forgetting(call) for call in calls]
        return Handle.together([*handles, Handle(interception.remove)]).remove

    return denoiser.follow(hook)


class Interception:
    """Lets `attend` compute the softmax attention inside some layers, until `remove`.

    Only processor objects are changed, each by a subclass of its own class; `refresh` follows
    processors that were exchanged since. A layer whose dispatcher backend was set to a vendor's is
    brought to diffusers' native one while it runs, itself alone.
    """

    def __init__(self, layers: Sequence[AttentionLayer], attend: Attend) -> None:
        self._layers = {id(layer.module): layer for layer in layers}
        self.attend = attend
        self._held: dict[int, tuple[Any, Handle]] = {}
        self.seen: set[str] = set()
        """Names of the layers in which attention was intercepted so far."""
        try:
            self.refresh()
        except BaseException:
            self.remove()
            raise

    def refresh(self) -> None:
        """Hold the processors that the layers have now."""
        wanted = {id(p): p for p in (each.module.processor for each in self._layers.values())}
        for key in self._held.keys() - wanted.keys():
            self._held.pop(key)[1].remove()
        for key, processor in wanted.items():
            if key not in self._held:
                call = partial(self._call, processor, plain_class(processor).__call__)
                undo = override(processor, {"__call__": call})
                self._held[key] = (processor, Handle(undo))

    def remove(self) -> None:
        """Give all processors back."""
        while self._held:
            self._held.popitem()[1][1].remove()

    def _call(
        self,
        processor: Any,
        untouched: Callable[..., Any],
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        module = args[0] if args else kwargs.get("attn")
        layer = self._layers.get(id(module))
        if layer is None or getattr(processor, "_parallel_config", None) is not None:
            return original(*args, **kwargs)
        # `original` is bound, which Dynamo rebuilds as a look-up that would find this override
        return _intercepted(self, processor, layer, untouched, args, kwargs)


# A compiled block breaks its graph here: Dynamo cannot trace the mode.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _intercepted(
    owner: Interception,
    processor: Any,
    layer: AttentionLayer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    with native_dispatch(processor), _Intercept(owner, layer):
        return call(processor, *args, **kwargs)


class _Intercept(TorchFunctionMode):
    """Sees `scaled_dot_product_attention` while one layer's processor runs."""

    def __init__(self, owner: Interception, layer: AttentionLayer) -> None:
        super().__init__()
        self._owner, self._layer = owner, layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self._owner.seen.add(self._layer.name)
        plain = partial(func, *args, **kwargs)
        call = _described(self._layer, plain, *args, **kwargs)
        return plain() if call is None else self._owner.attend(call)


def _described(
    layer: AttentionLayer,
    plain: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall | None:
    """The call of an inference attention; None for what trains."""
    del enable_gqa  # heads of query and key tell
    if dropout_p > 0 or query.requires_grad or key.requires_grad or value.requires_grad:
        return None
    return AttentionCall(layer, query, key, value, attn_mask, is_causal, scale, plain)

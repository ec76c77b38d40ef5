"""The layers of a denoiser that adapters are made for, and whether a file fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from accel.chain import Chain
from accel.family import Family
from accel.method import AccelError
from accel.sublayer import sublayers


def attention_hosts(module: Any, family: Family) -> dict[str, int]:
    """Paths and channels of the attention layers that get an adapter.

    Every cross-attention, as in the paper, or where there is none every joint attention; in a
    U-Net, which has few, every self-attention too.
    """
    names = {id(part): name for name, part in module.named_modules()}
    layers = sublayers(Chain(module, family), "AGD")
    crossing = any(layer.kind == "cross" for layer in layers) and family.name != "unet"
    kinds = ("cross",) if crossing else ("self", "cross", "fused")
    chosen = [
        layer.modules[1] if layer.kind == "fused" else layer.modules[0]
        for layer in layers
        if layer.kind in kinds
    ]
    if not chosen:
        raise AccelError(f"AGD: {type(module).__name__} has no attention layers that are known")
    return {names[id(attention)]: width_of(attention) for attention in chosen}


def weight_hosts(module: Any) -> dict[str, list[int]]:
    """Paths and weight shapes of all linear layers and 2-D convolutions."""
    return {
        name: shape_of(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros")
    }


def width_of(attention: Any) -> int:
    """Channels that an attention layer takes; a LoRA around its query changes nothing."""
    query = getattr(attention, "to_q", None)
    return int(getattr(query, "in_features", 0))


def shape_of(layer: Any) -> list[int]:
    """Shape of a layer's weight; packed weights count as what they stand for."""
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    return list(layer.weight.shape)


def fitting(
    denoiser: Any, base: str, hosts: Mapping[str, Any], size: Callable[[Any], Any], unit: str
) -> dict[str, Any]:
    """The modules of `hosts`, inside of a LoRA the layer that it wraps.

    `hosts` says the size of each, in `unit`, as `size` measures it. Raises `AccelError` for a
    denoiser that is not a `base` or has not these hosts.
    """
    modules = dict(denoiser.named_modules())
    found = {
        path: getattr(modules[path], "base_layer", modules[path])
        for path in hosts
        if path in modules
    }
    missing = [path for path in hosts if path not in found]
    own = type(denoiser).__name__
    if own != base or missing:
        raise AccelError(
            f"these adapters are for a {base} with {len(hosts)} hosts; this {own} lacks "
            f"{len(missing)} of them" + (f", first {missing[0]!r}" if missing else "")
        )
    for path, module in found.items():
        if size(module) != hosts[path]:
            raise AccelError(
                f"these adapters are for a {base} whose {path!r} has {hosts[path]} {unit}; here it "
                f"has {size(module)}: they belong to another base"
            )
    return found

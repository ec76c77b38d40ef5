"""Stable Diffusion 1.x, 2.x and SDXL U-Nets: a chain of layers with skip connections."""

from itertools import zip_longest
from typing import Any

from accel.family import Family, Stack, by_shape

RESNET = Stack("resnets", hidden="input_tensor", reshapes=True)
ATTENTION = Stack("attentions", wrapped=True)
SAMPLER = Stack("samplers", reshapes=True)
KNOWN = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
"""Blocks whose layers are called in the order described here."""

Unit = list[tuple[Any, Stack]]


def units(unet: Any) -> tuple[list[Unit], Unit, list[Unit]]:
    """Layers between two skip connections: of the down path, of the middle, of the up path.

    Each skip connection leaves before the first unit (the input convolution's) or after a unit of
    the down path, and enters before a unit of the up path, in reverse.
    """
    down: list[Unit] = []
    for block in unet.down_blocks:
        down += _pairs(block)
        down += [[(sampler, SAMPLER)] for sampler in block.downsamplers or ()]
    up: list[Unit] = []
    for block in unet.up_blocks:
        up += _pairs(block)
        up[-1] += [(sampler, SAMPLER) for sampler in block.upsamplers or ()]
    return down, _middle(unet.mid_block), up


def _pairs(block: Any) -> list[Unit]:
    attentions = getattr(block, "attentions", ())
    return [
        [(resnet, RESNET), *([(attention, ATTENTION)] if attention is not None else [])]
        for resnet, attention in zip_longest(block.resnets, attentions)
    ]


def _middle(block: Any) -> Unit:
    if block is None:
        return []
    first, *rest = block.resnets
    layers: Unit = [(first, RESNET)]
    for attention, resnet in zip(block.attentions, rest, strict=True):
        if attention is not None:
            layers.append((attention, ATTENTION))
        layers.append((resnet, RESNET))
    return layers


def layers(unet: Any) -> Unit:
    """All layers in calling order; none when a block's order is not known."""
    blocks = [*unet.down_blocks, *unet.up_blocks]
    if unet.mid_block is not None:
        blocks.append(unet.mid_block)
    if any(type(block).__name__ not in KNOWN for block in blocks):
        return []
    down, middle, up = units(unet)
    return [layer for unit in (*down, middle, *up) for layer in unit]


def spans(unet: Any) -> list[tuple[int, int]]:
    """For each skip connection, outermost first, the layers [start, stop) that it goes round."""
    down, _, up = units(unet)
    total = len(layers(unet))
    return [
        (sum(map(len, down[:skip])), total - sum(map(len, up[-skip - 1 :])))
        for skip in range(len(up))
    ]


FAMILY = Family(name="unet", latent="sample", blocks=layers, spans=spans, resized=by_shape)

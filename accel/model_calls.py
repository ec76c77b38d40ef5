"""Whole calls of a denoiser, and the sites that skip them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from accel.family import Arguments
from accel.hooks import waited
from accel.signals import SpanSignals
from accel.site import Computed, Forward

if TYPE_CHECKING:
    from accel.denoiser import Denoiser

logger = logging.getLogger(__name__)


def call_model(
    denoiser: Denoiser, forward: Forward, arguments: Arguments, run: Callable[[], Any]
) -> Any:
    """The denoiser is called: `run` it, or skip it where a site covers whole calls."""
    index = next((i for i, site in enumerate(denoiser.sites) if site.stop is None), None)
    if index is None:
        return _run(denoiser, forward, run)
    latent = stacked(arguments.get(denoiser.family.latent))
    if latent is None:
        logger.warning("latents of different shapes in one call; whole calls are not skipped")
        return _run(denoiser, forward, run)
    signals = SpanSignals(denoiser, forward, latent)
    state = forward.state.sites[index]
    if forward.decide(index, signals):
        first, *others = forward.forecast(index, signals, lambda: predictions(run()))
        assert first is not None  # only non-None predictions are remembered
        return state.dress(first + latent_like(latent, first.shape).to(first.dtype), *others)
    output = _run(denoiser, forward, run)
    found = predictions(output)
    bases = (latent_like(latent, found[0].shape), *map(torch.zeros_like, found[1:]))
    kept = (found[0] - bases[0], *found[1:])
    forward.remember(index, signals, Computed(bases, found, kept))
    state.dress = dressed(output)
    return output


def _run(denoiser: Denoiser, forward: Forward, run: Callable[[], Any]) -> Any:
    output = run()
    if not forward.blocks:
        forward.blocks = forward.blocks_run = max(len(denoiser.chain.blocks), 1)
    return output


def latent_like(latent: Any, shape: Any) -> Any:
    """The latent in the prediction's shape: extra channels cut off, missing ones zero.

    Image-to-video latents carry condition channels; learned-variance predictions carry more.
    """
    different = [axis for axis, size in enumerate(shape) if latent.shape[axis] != size]
    if not different:
        return latent
    result = latent.new_zeros(shape)
    if latent.dim() == len(shape) and len(different) == 1:
        axis = different[0]
        common = min(latent.shape[axis], shape[axis])
        result.narrow(axis, 0, common).copy_(latent.narrow(axis, 0, common))
    return result


def stacked(value: Any) -> Any:
    """A tensor as it is, a list of equal shapes as a batch (Z-Image), or None."""
    if not isinstance(value, list):
        return value
    return torch.stack(value) if len({each.shape for each in value}) == 1 else None


def predictions(output: Any) -> tuple[Any, ...]:
    """The tensors that a denoiser returns, its prediction first (LTX-2 has one of sound too)."""
    values = output if isinstance(output, tuple) else output.values()
    found = (stacked(value) for value in values)
    return tuple(waited(value) for value in found if isinstance(value, torch.Tensor))


def dressed(output: Any) -> Callable[..., Any]:
    """How to dress predictions as `output` is: a tuple or a diffusers output object."""
    values = output if isinstance(output, tuple) else tuple(output.values())
    names = None if isinstance(output, tuple) else tuple(output.keys())
    kind = type(output)

    def dress(*given: Any) -> Any:
        new, left = [], list(given)
        for value in values:
            if left and isinstance(value, torch.Tensor | list):
                each = left.pop(0)
                new.append(list(each) if isinstance(value, list) else each)
            else:
                new.append(value)
        return tuple(new) if names is None else kind(**dict(zip(names, new, strict=True)))

    return dress

"""Whole calls of a denoiser, and the sites that skip them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accel.family import Arguments
from accel.hooks import waited
from accel.signals import SpanSignals
from accel.site import Computed, Forward

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


def call_model(
    denoiser: Denoiser, forward: Forward, arguments: Arguments, run: Callable[[], Any]
) -> Any:
    """The denoiser is called: `run` it, or skip it where a site covers whole calls."""
    index = next((i for i, site in enumerate(denoiser.sites) if site.stop is None), None)
    if index is None:
        return _run(denoiser, forward, run)
    latent = arguments.get(denoiser.family.latent)
    signals = SpanSignals(denoiser, forward, latent)
    state = forward.state.sites[index]
    if forward.decide(index, signals):
        (value,) = forward.forecast(index, signals, lambda: (run()[0],))
        assert value is not None  # only non-None predictions are remembered
        return state.dress(value + latent_like(latent, value.shape).to(value.dtype))
    output = _run(denoiser, forward, run)
    prediction = waited(output[0])
    base = latent_like(latent, prediction.shape)
    computed = Computed((base,), (prediction,), (prediction - base,))
    forward.remember(index, signals, computed)
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


def dressed(output: Any) -> Callable[[Any], Any]:
    """How to dress a prediction as `output` is: a tuple or a diffusers output object."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda prediction: (prediction, *rest)
    kind, field = type(output), next(iter(output.keys()))
    return lambda prediction: kind(**{field: prediction})

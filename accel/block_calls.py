"""Calls of a denoiser's blocks, and the ranges of them that sites skip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.family import HIDDEN, Arguments
from accel.hooks import split_before
from accel.signals import SpanSignals
from accel.site import Computed, Forward, Site, Streams, add, residual

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


def call_block(
    denoiser: Denoiser, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Block `index` of the chain is called: run it, or skip what a site covers."""
    forward, chain = denoiser.forward, denoiser.chain
    if forward is None:
        return _outside(denoiser, index, original(*args, **kwargs), args, kwargs)
    forward.blocks += 1
    if index == 0:
        original, args, kwargs = split_before(chain.blocks[0], original, args, kwargs)
    arguments = chain.arguments(index, args, kwargs)
    if index == 0:
        forward.entry, forward.entry_arguments = chain.inputs(arguments), arguments
    number, site = _site_of(denoiser, index)
    if site is None or site.stop is None:
        forward.blocks_run += 1
        return chain.learn(index, arguments, original(*args, **kwargs))
    last = index == site.stop - 1
    if index == site.start:
        forward.inputs[number] = chain.inputs(arguments)
        if chain.known(index) and forward.entry:
            forward.decide(number, SpanSignals(denoiser, forward, forward.inputs[number][0]))
    if number in forward.skipping:
        if not last:
            return chain.pass_on(index, chain.inputs(arguments))
        run = partial(original, *args, **kwargs)
        return _stand_in(denoiser, forward, number, arguments, run)
    forward.blocks_run += 1
    output = chain.learn(index, arguments, original(*args, **kwargs))
    if last and chain.known(index) and number in forward.inputs and forward.entry:
        _remember(denoiser, forward, number, chain.outputs(index, output))
    return output


def _outside(
    denoiser: Denoiser, index: int, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a block gave in a call that no site has a part in; the chain may watch."""
    if denoiser.studying:
        chain = denoiser.chain
        chain.learn(index, chain.arguments(index, args, kwargs), output)
    return output


def _stand_in(
    denoiser: Denoiser, forward: Forward, number: int, arguments: Arguments, run: Callable[[], Any]
) -> Any:
    """What the last block of the skipped site `number` returns; `run` would compute it."""
    site, entered = denoiser.sites[number], forward.inputs[number]
    assert site.stop  # a range of blocks
    last = site.stop - 1

    def compute() -> Streams:
        forward.blocks_run += 1
        return denoiser.chain.outputs(last, run())

    forecast = forward.forecast(number, SpanSignals(denoiser, forward, entered[0]), compute)
    if site.keeps_output:
        forecast = _own(denoiser, forecast)
    else:
        forecast = add(denoiser.chain.relayout(entered, arguments.get(HIDDEN)), forecast)
    return denoiser.chain.pack(last, forecast)


def _remember(denoiser: Denoiser, forward: Forward, number: int, outputs: Streams) -> None:
    """The last block of site `number` was computed, and so was its first."""
    entered = forward.inputs[number]
    if len(entered) != len(outputs):
        return  # a stream was found in this very call
    inputs = denoiser.chain.relayout(entered, outputs[0])
    keeps_output = denoiser.sites[number].keeps_output
    kept = _own(denoiser, outputs) if keeps_output else residual(outputs, inputs)
    if kept[0] is not None:
        signals = SpanSignals(denoiser, forward, entered[0])
        forward.remember(number, signals, Computed(inputs, outputs, kept))


def _own(denoiser: Denoiser, streams: Streams) -> Streams:
    """Streams that a U-Net may write into, as FreeU does between layers, and nothing kept is."""
    if denoiser.family.spans is None:
        return streams
    return tuple(None if stream is None else stream.clone() for stream in streams)


def _site_of(denoiser: Denoiser, index: int) -> tuple[int, Site | None]:
    for number, site in enumerate(denoiser.sites):
        if site.stop and site.start <= index < site.stop:
            return number, site
    return -1, None

"""Lossless first: the fastest exact attention for each shape, timed on the model's own tensors."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from accel.attention_calls import AttentionCall
from accel.kernels.attention_table import KERNELS

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

REPEATS = 3
GAIN = 0.95
"""Another kernel replaces torch's choice when it takes at most this share of its time."""
TOLERANCE = 0.01
"""Mean absolute difference to torch's choice, relative, that rounding explains."""


class Fastest:
    """Times the exact kernels at the first call of each shape, and keeps to the fastest."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = candidates
        self.pinned: dict[Any, str] = {}

    def name(self, call: AttentionCall) -> str:
        """The kernel for a call; the first one of a shape costs a few calls of each candidate."""
        key = signature(call)
        if key not in self.pinned:
            measured = self._measured(call)
            if measured is None:
                return "sdpa"
            self.pinned[key] = measured
        return self.pinned[key]

    def _measured(self, call: AttentionCall) -> str | None:
        """None where the call's values tell nothing: torch's own are not finite."""
        runnable = [n for n in self.candidates if KERNELS[n].why_not(call.query) is None]
        others = [name for name in runnable if name != "sdpa"]
        if not others:
            return "sdpa"
        expected = call.plain()
        if not bool(expected.isfinite().all()):
            return None
        seconds = {"sdpa": _seconds(call.plain, call.query)}
        for name in others:
            run = KERNELS[name].run
            try:
                output = run(call)
                if _agree(output, expected):
                    seconds[name] = _seconds(lambda run=run: run(call), call.query)  # type: ignore[misc]
                else:
                    logger.warning("attention kernel %s gave wrong values; left out", name)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a vendor raises for what it does not take
                logger.debug("attention kernel %s: %s", name, error)
        usual = seconds["sdpa"]
        best = min(seconds, key=lambda name: seconds[name])
        chosen = best if seconds[best] <= GAIN * usual else "sdpa"
        logger.info(
            "attention %s %s: %s (%.2f times the speed of torch's choice)",
            tuple(call.query.shape),
            call.query.dtype,
            chosen,
            usual / seconds[chosen],
        )
        return chosen


def signature(call: AttentionCall) -> tuple[Any, ...]:
    """What decides which kernels take a call, and how fast they are."""
    mask = call.attn_mask
    return (
        tuple(call.query.shape),
        tuple(call.key.shape),
        call.query.dtype,
        call.query.device,
        call.query.stride()[1:3],
        None if mask is None else (mask.dtype, tuple(mask.shape)),
        call.is_causal,
    )


def _agree(output: Tensor, expected: Tensor) -> bool:
    difference = (output.float() - expected.float()).abs().mean()
    return bool(difference <= TOLERANCE * expected.float().abs().mean())


def _seconds(run: Callable[[], Any], like: Tensor) -> float:
    """Median of a few runs, the device's queue emptied around each."""
    taken = []
    for _ in range(REPEATS):
        _synchronize(like)
        began = time.perf_counter()
        run()
        _synchronize(like)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _synchronize(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)

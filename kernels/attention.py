"""Attention kernels: the fastest exact one for each shape, or a low-bit one, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.attention_calls import AttentionCall, AttentionLayer, attention_layers, intercept
from accel.denoiser import Denoiser
from accel.kernels.attention_fastest import Fastest, signature
from accel.kernels.attention_precision import BUCKETS, Calibration, Plan, bucket
from accel.kernels.attention_table import KERNELS, LOSSLESS, LOW_BIT, survey
from accel.method import AccelError, Handle, check, is_count, is_number, is_series

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CHOICES = ("auto", "adaptive", *KERNELS)


@dataclass(frozen=True)
class Attention:
    """Compute softmax attention by another kernel; where that cannot run, by torch's as before.

    `kernel`: "auto" times the exact kernels that can run here (torch's cuDNN, flash and efficient
    backends, flash-attn if installed) at the first call of each shape and keeps to the fastest: no
    approximation. "sage_int8" and "sage_int8_fp8" are SageAttention (Zhang et al., 2024): INT8
    scores, values in half precision or FP8. "adaptive" measures in the first run, which stays
    exact, how far each of those is from exact attention (SageAttention 1 §4), and gives every
    layer and fifth of the schedule the fastest whose cosine similarity is at least `similarity`
    and whose relative L1 at most `error`; `methods` then carries the `plan`. Any other name of
    `CHOICES` pins that kernel; "sdpa" is what the model does anyway.

    `layers`: patterns of module names, such as "*.attn1". `least`: fewer query or key tokens than
    this stay with torch (low-bit kernels only), which also leaves attention to short prompts exact.
    `reference`: where a low-bit kernel cannot run, run its plain-torch twin: slow, for measuring
    its error. Differs from the paper: scales a query row and a key block instead of a thread.
    Static: rows of a batch are independent. Holds nothing. Breaks the graph of compiled blocks
    at each attention.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"kernel": "sage_int8"},
        {"kernel": "sage_int8_fp8"},
        {"kernel": "adaptive"},
    )

    kernel: str = "auto"
    layers: tuple[str, ...] = ("*",)
    least: int = 1024
    similarity: float = 0.998
    error: float = 0.05
    plan: Plan | None = None
    reference: bool = False

    def __post_init__(self) -> None:
        check(self.kernel in CHOICES, self, "kernel", f"one of {', '.join(CHOICES)}")
        patterns = isinstance(self.layers, tuple) and all(isinstance(p, str) for p in self.layers)
        check(patterns and len(self.layers) > 0, self, "layers", "a tuple of name patterns")
        check(is_count(self.least, 1), self, "least", "a whole number ≥ 1")
        share = is_number(self.similarity) and 0 < self.similarity <= 1
        check(share, self, "similarity", "a number in (0, 1]")
        check(is_number(self.error) and self.error >= 0, self, "error", "a number ≥ 0")
        check(isinstance(self.reference, bool), self, "reference", "True or False")
        if not isinstance(self.plan, Mapping | None):
            raise AccelError("Attention(plan=…): a mapping from layer names to kernel names")
        for kernels in (self.plan or {}).values():
            if not is_series(kernels, KERNELS.__contains__) or len(kernels) != BUCKETS:
                raise AccelError(
                    f"Attention(plan=…): each layer needs {BUCKETS} kernels out of "
                    f"{', '.join(KERNELS)}, not {kernels!r}"
                )

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures a plan and stays exact."""
        return self.kernel == "adaptive" and self.plan is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the processors of all attention layers whose name fits `layers`."""
        known = attention_layers(denoiser.module)
        chosen = [layer for layer in known if _fits(layer, self.layers)]
        if not chosen:
            names = ", ".join(layer.name for layer in known[:4]) or "none"
            raise AccelError(
                f"Attention: no attention layer of {type(denoiser.module).__name__} has a name "
                f"like {' or '.join(self.layers)}; it has {names}{', …' if known[4:] else ''}"
            )
        installed = _Installed(self, denoiser)
        return intercept(denoiser, chosen, installed.attend).settling(installed.settled)

    @classmethod
    def survey(cls, query: Tensor) -> dict[str, str]:
        """For tensors like `query`: each kernel's name and "runs", or why it does not."""
        return survey(query)


def _fits(layer: AttentionLayer, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(layer.name, pattern) for pattern in patterns)


class _Installed:
    """The method on one denoiser: chooses a kernel for each call."""

    def __init__(self, settings: Attention, denoiser: Denoiser) -> None:
        self.settings, self.denoiser = settings, denoiser
        self.fastest = Fastest(LOSSLESS)
        self.plan: Plan | None = settings.plan
        self.calibration: Calibration | None = None
        self.measured_run = -1
        self.refused: dict[tuple[Any, ...], str | None] = {}

    def settled(self) -> Attention:
        """The settings with the plan that was measured by now."""
        if not self.settings.unmeasured:
            return self.settings
        return replace(self.settings, plan=self._measured_plan())

    def _measured_plan(self) -> Plan | None:
        run = self.denoiser.clock.completed
        if self.plan is None and self.calibration is not None and self.measured_run == run:
            self.plan = self.calibration.plan()
        return self.plan

    def attend(self, call: AttentionCall) -> Tensor:
        """One attention of one layer."""
        forward = self.denoiser.forward
        if self.settings.kernel == "auto":
            return self._run(self.fastest.name(call), call)
        if self.settings.kernel != "adaptive":
            return self._run(self.settings.kernel, call)
        if forward is None:
            return call.plain()
        part = bucket(forward.place, forward.clock.schedule)
        plan = self._measured_plan()
        if plan is not None:
            parts = plan.get(call.layer.name)
            return self._run(parts[part] if parts else "sdpa", call)
        if self.measured_run != forward.clock.run:
            self.measured_run = forward.clock.run
            self.calibration = Calibration(LOW_BIT, self.settings.similarity, self.settings.error)
        assert self.calibration is not None  # made with the run's number
        usable = [name for name in LOW_BIT if self._why_not(name, call) is None]
        return self.calibration.attend(call, part, usable)

    def _run(self, name: str, call: AttentionCall) -> Tensor:
        """The kernel, or torch's attention where it cannot run; found out once for each shape."""
        key = (name, signature(call))
        if key not in self.refused:
            self._refuse(key, self._why_not(name, call))
        if self.refused[key] is None:
            try:
                return KERNELS[name].run(call)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler's or a vendor's: no run may die of it
                self._refuse(key, f"{type(error).__name__}: {error}")
        return call.plain()

    def _refuse(self, key: tuple[Any, ...], reason: str | None) -> None:
        """Remember why, and say it unless it was said of another shape."""
        said = {(known[0], why) for known, why in self.refused.items()}
        if reason is not None and (key[0], reason) not in said:
            logger.warning("Attention: %s stays with torch's attention: %s", key[0], reason)
        self.refused[key] = reason

    def _why_not(self, name: str, call: AttentionCall) -> str | None:
        """Why this call stays with torch's attention, cheap reasons first."""
        kernel, mask = KERNELS[name], call.attn_mask
        if not kernel.exact and min(call.query.shape[2], call.key.shape[2]) < self.settings.least:
            return f"layers with fewer than {self.settings.least} query or key tokens"
        if not kernel.exact and mask is not None and tuple(mask.shape[1:3]) != (1, 1):
            return f"a mask of shape {tuple(mask.shape)} differs by head or query"
        return kernel.why_not(call.query, self.settings.reference)

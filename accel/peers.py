"""Others' caches as rows of the benchmark, on the same prompts in the same process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from accel import generate
from accel.bench import Candidate

if TYPE_CHECKING:
    from accel.bench import Bench


def candidates(bench: Bench) -> Iterator[Candidate]:
    """Every cache of diffusers at several settings, and cache-dit's where it is installed."""
    denoiser = bench.pipe.transformer if hasattr(bench.pipe, "transformer") else bench.pipe.unet
    calls: list[None] = []
    counting = denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
    untouched_work = _linear_work(bench, contextlib.nullcontext())
    counting.remove()
    for label, make in _configs(bench):
        yield _candidate(
            bench,
            label,
            lambda make=make: denoiser.enable_cache(make()),  # type: ignore[misc]
            denoiser.disable_cache,
            untouched_work,
        )
    if importlib.util.find_spec("cache_dit") is None or not hasattr(bench.pipe, "transformer"):
        return
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit

    for label, settings in _cache_dit(bench.plan.steps, two_calls=len(calls) > bench.plan.steps):
        yield _candidate(
            bench,
            f"{label} of cache-dit",
            lambda settings=settings: cache_dit.enable_cache(bench.pipe, **settings()),  # type: ignore[misc]
            lambda: cache_dit.disable_cache(bench.pipe),
            untouched_work,
        )


def _candidate(
    bench: Bench,
    label: str,
    enable: Callable[[], Any],
    disable: Callable[[], Any],
    untouched_work: int,
) -> Candidate:
    @contextlib.contextmanager
    def switch() -> Iterator[None]:
        enable()
        try:
            yield
        finally:
            disable()

    def share() -> float:
        disable()
        try:
            return _linear_work(bench, switch()) / untouched_work
        finally:
            enable()

    return Candidate(label, "peer", switch, share)


def _cache_dit(steps: int, two_calls: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """DBCache from strict to loose, and its masks of steps; held and by TaylorSeer.

    One block decides (F1B0), as it is fastest; the authors' default, eight blocks, comes last.
    Where guidance calls the denoiser twice a step, it has to be told.
    """
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig, steps_mask

    def settings(taylor: bool, **config: Any) -> dict[str, Any]:
        return {
            "cache_config": DBCacheConfig(
                num_inference_steps=steps, enable_separate_cfg=two_calls, **config
            ),
            "calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
        }

    for taylor in (False, True):
        end = ", TaylorSeer" if taylor else ""
        for threshold in (0.08, 0.16, 0.3, 0.5):
            yield (
                f"DBCache(F1, threshold={threshold}{end})",
                lambda taylor=taylor, threshold=threshold: settings(  # type: ignore[misc]
                    taylor,
                    Fn_compute_blocks=1,
                    max_warmup_steps=4,
                    residual_diff_threshold=threshold,
                ),
            )
        for mask in ("medium", "fast", "ultra"):
            yield (
                f"DBCache(F1, mask={mask}{end})",
                lambda taylor=taylor, mask=mask: settings(  # type: ignore[misc]
                    taylor,
                    Fn_compute_blocks=1,
                    steps_computation_mask=steps_mask(mask_policy=mask, total_steps=steps),
                    steps_computation_policy="static",
                ),
            )
    yield "DBCache()", lambda: settings(False)


def _linear_work(bench: Bench, switched: contextlib.AbstractContextManager[None]) -> int:
    """Multiplications in the denoiser's linear layers during one run: what a peer computes."""
    denoiser = bench.pipe.transformer if hasattr(bench.pipe, "transformer") else bench.pipe.unet
    work = 0

    def count(module: torch.nn.Linear, _: Any, output: torch.Tensor) -> None:
        nonlocal work
        work += output.numel() * module.in_features

    layers = [layer for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with switched:
            bench.make(0)
    finally:
        for hook in hooks:
            hook.remove()
    return work


def _configs(bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    from diffusers import (
        FasterCacheConfig,
        FirstBlockCacheConfig,
        MagCacheConfig,
        PyramidAttentionBroadcastConfig,
        TaylorSeerCacheConfig,
    )

    pipe, steps = bench.pipe, bench.plan.steps
    for threshold in (0.05, 0.1, 0.2, 0.4):
        yield (
            f"FirstBlockCache(threshold={threshold})",
            lambda t=threshold: FirstBlockCacheConfig(threshold=t),  # type: ignore[misc]
        )
    ratios = _measured_ratios(bench)
    for threshold, skips in ((0.06, 3), (0.12, 4), (0.24, 6), (0.5, 8)):
        yield (
            f"MagCache(threshold={threshold}, max_skip_steps={skips}), measured ratios",
            lambda t=threshold, k=skips: MagCacheConfig(  # type: ignore[misc]
                threshold=t, max_skip_steps=k, num_inference_steps=steps, mag_ratios=ratios
            ),
        )
    for interval, forms in ((3, (False, True)), (5, (False, True)), (7, (True,))):
        for lite in forms:
            yield (
                f"TaylorSeer(interval={interval}{', lite' if lite else ''})",
                lambda i=interval, use=lite: TaylorSeerCacheConfig(  # type: ignore[misc]
                    cache_interval=i,
                    taylor_factors_dtype=torch.float32,
                    use_lite_mode=use,
                ),
            )
    timestep = {"current_timestep_callback": lambda: pipe.current_timestep}
    for spatial, cross in ((2, 5), (4, 8)):
        yield (
            f"PyramidAttentionBroadcast(spatial={spatial}, cross={cross})",
            lambda s=spatial, c=cross: PyramidAttentionBroadcastConfig(  # type: ignore[misc]
                spatial_attention_block_skip_range=s,
                cross_attention_block_skip_range=c,
                **timestep,
            ),
        )
    yield (
        "FasterCache(spatial=2)",
        lambda: FasterCacheConfig(spatial_attention_block_skip_range=2, **timestep),
    )
    try:
        from diffusers import SeaCacheConfig
    except ImportError:
        return
    for threshold in (0.1, 0.25, 0.5, 1.0):
        yield f"SeaCache(threshold={threshold})", lambda t=threshold: SeaCacheConfig(threshold=t)  # type: ignore[misc]


def _measured_ratios(bench: Bench) -> list[float]:
    """Ratios from our own measuring run: diffusers would print them for copying by hand."""
    import accel

    settled, _ = generate.settle(
        bench.pipe,
        (accel.MagCache(),),
        lambda: generate.make(bench.pipe, bench.call | {"prompt": bench.measuring_prompt}, 0),
    )
    tables = settled[0].ratios
    return list(next(iter(tables.values())))

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
from accel.recipe import Recipe

if TYPE_CHECKING:
    from accel.bench import Bench


def candidates(bench: Bench) -> Iterator[Candidate]:
    """Caches of diffusers at several settings; of cache-dit and ParaAttention if installed."""
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
    if not hasattr(bench.pipe, "transformer"):
        return
    two_calls = len(calls) > bench.plan.steps
    for label, enable, disable in _libraries(bench, two_calls):
        yield _candidate(bench, label, enable, disable, untouched_work)


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


Switch = tuple[str, Callable[[], Any], Callable[[], Any]]
"""A label, what switches a cache on, and what switches it off."""


def _libraries(bench: Bench, two_calls: bool) -> Iterator[Switch]:
    if importlib.util.find_spec("cache_dit") is not None:
        yield from _cache_dit(bench.pipe, bench.plan.steps, two_calls)
    if importlib.util.find_spec("para_attn") is not None:
        yield from _para_attention(bench.pipe, two_calls)


def _cache_dit(pipe: Any, steps: int, two_calls: bool) -> Iterator[Switch]:
    """DBCache from strict to loose, and its masks of steps; held and by TaylorSeer.

    One block decides (F1B0), as it is fastest; the authors' default, eight blocks, comes last.
    Where guidance calls the denoiser twice a step, it has to be told.
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit

    def switch(label: str, taylor: bool, **config: Any) -> Switch:
        def enable() -> None:
            order = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
            cache_dit.enable_cache(
                pipe,
                cache_config=cache_dit.DBCacheConfig(
                    num_inference_steps=steps, enable_separate_cfg=two_calls, **config
                ),
                calibrator_config=order,
            )

        return f"DBCache({label}) of cache-dit", enable, lambda: cache_dit.disable_cache(pipe)

    for taylor in (False, True):
        end = ", TaylorSeer" if taylor else ""
        for threshold in (0.08, 0.16, 0.3, 0.5):
            yield switch(
                f"F1, threshold={threshold}{end}",
                taylor,
                Fn_compute_blocks=1,
                max_warmup_steps=4,
                residual_diff_threshold=threshold,
            )
        for mask in ("medium", "fast", "ultra"):
            yield switch(
                f"F1, mask={mask}{end}",
                taylor,
                Fn_compute_blocks=1,
                steps_computation_mask=cache_dit.steps_mask(mask_policy=mask, total_steps=steps),
                steps_computation_policy="static",
            )
    yield switch("", False)


def _para_attention(pipe: Any, two_calls: bool) -> Iterator[Switch]:
    """First-block cache, held and by TaylorSeer.

    It replaces the call of the pipeline's class and has no way back; both are put back here.
    """
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe

    kind, denoiser, call = type(pipe), pipe.transformer, type(pipe).__call__

    def disable() -> None:
        kind.__call__ = call
        for owner, name in ((kind, "_is_cached"), (denoiser, "_is_cached"), (denoiser, "forward")):
            if name in vars(owner):
                delattr(owner, name)

    for taylor in (False, True):
        end = ", TaylorSeer" if taylor else ""
        for threshold in (0.05, 0.1, 0.2, 0.4):
            yield (
                f"FBCache(threshold={threshold}{end}) of ParaAttention",
                lambda taylor=taylor, threshold=threshold: apply_cache_on_pipe(  # type: ignore[misc]
                    pipe,
                    residual_diff_threshold=threshold,
                    enable_alter_cache=two_calls,
                    enable_taylorseer=taylor,
                ),
                disable,
            )


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

    recipe = generate.settle(
        bench.pipe,
        Recipe.of((accel.MagCache(),)),
        lambda: generate.make(bench.pipe, bench.call | {"prompt": bench.measuring_prompt}, 0),
    )
    tables = recipe.methods[0].ratios  # type: ignore[attr-defined]
    return list(next(iter(tables.values())))

"""Every cache against an independent replay, and every report against counted block calls.

The replay runs all blocks of every step and overwrites what follows the skipped span (the final
norm, or the denoiser's output) with input plus old residual, wherever the engine reported a reuse.
It shares no code with the engine and knows nothing of blocks' outputs, so wrong stream orders,
mixed branches, wrong steps and stale residuals all show.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from contract_cases import ACTIVE, GENERAL, ONE_SPAN, SUBLAYER, UNETS, family_of, make, pairs_of
from tiny_pipelines import TINY, built, run

import accel

pairs = pairs_of([name for name in GENERAL if name not in SUBLAYER])
one_span = pairs_of(ONE_SPAN)
COMPONENTS = ("transformer", "transformer_2", "unet")
NORMS = ("norm_final", "norm_out", "conv_norm_out")
LAYERS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")
STREAMS = ("hidden_states", "encoder_hidden_states")


def denoisers(pipe: Any) -> dict[str, Any]:
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if module is not None}


@functools.cache
def blocks_of(module: Any) -> list[Any]:
    """The blocks in calling order, written down without the engine's families."""
    if hasattr(module, "down_blocks"):
        return layers_called(module)
    if hasattr(module, "temporal_transformer_blocks"):
        both = zip(module.transformer_blocks, module.temporal_transformer_blocks, strict=True)
        return [block for pair in both for block in pair]
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for name in names for block in getattr(module, name, ())]


def layers_called(unet: Any) -> list[Any]:
    """The layers of a U-Net in the order in which one forward calls them."""
    found: list[Any] = []
    layers = [part for part in unet.modules() if type(part).__name__ in LAYERS]
    hooks = [part.register_forward_pre_hook(lambda p, _: found.append(p)) for part in layers]
    config, added = unet.config, {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
    sample = torch.zeros(1, config.in_channels, 8, 8)
    states = torch.zeros(1, 4, config.cross_attention_dim)
    with torch.no_grad():
        unet(sample, 0, states, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    return found


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))


def streams(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    if "input_tensor" in bound:  # a U-Net's residual layer
        return {"hidden_states": bound["input_tensor"]}
    return {name: bound[name] for name in STREAMS if bound.get(name) is not None}


def fitted(entry: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An input in the shape of an output: Latte's other layout, or padded learned variances."""
    if entry.shape == like.shape:
        return entry
    if entry.dim() == 3:
        by_token = entry.reshape(-1, like.shape[1], entry.shape[1], entry.shape[2])
        return by_token.transpose(1, 2).reshape(like.shape)
    padded = torch.zeros_like(like)
    padded[:, : entry.shape[1]] = entry
    return padded


class Replay:
    """Forward hooks on an untouched pipeline that repeat the reuses of a report.

    The span begins before block `start` (None: it is the whole denoiser) and ends `tail` blocks
    before the final norm.
    """

    def __init__(self, pipe: Any, rows: Any, start: int | None, tail: int, linear: bool) -> None:
        self.start, self.tail, self.linear = start, tail, linear
        self.total = 0
        self.entry: dict[str, torch.Tensor] = {}
        self.held: dict[tuple[str, int, str], list[tuple[int, torch.Tensor]]] = {}
        self.reused: dict[tuple[str, int, int], bool] = {}
        seen: Counter[tuple[str, int]] = Counter()
        for row in rows:
            place = (row.denoiser, row.step)
            self.reused[(*place, seen[place])] = row.verdict != "computed"
            seen[place] += 1
        self.per_step = max(seen.values())
        self.hooks: list[Any] = []
        for name, module in denoisers(pipe).items():
            self.watch(name, module)

    def watch(self, name: str, module: Any) -> None:
        def begin(_: Any, args: Any, kwargs: Any) -> None:
            step, ordinal = divmod(self.total, self.per_step)
            self.total += 1
            self.place = (name, step, ordinal)
            self.entry = {"hidden_states": first(args, kwargs)}

        def enter(block: Any, args: Any, kwargs: Any) -> None:
            self.entry = streams(block, args, kwargs)

        def leave_into_block(block: Any, args: Any, kwargs: Any) -> Any:
            bound = inspect.signature(block.forward).bind(*args, **kwargs)
            for stream, tensor in streams(block, args, kwargs).items():
                bound.arguments[stream] = self.value(stream, tensor)
            return bound.args, bound.kwargs

        def leave_into_norm(_: Any, args: Any) -> Any:
            return (self.value("hidden_states", args[0]), *args[1:])

        def answer(_: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.value("hidden_states", output[0]), *output[1:])
            output.sample = self.value("hidden_states", output.sample)
            return output

        self.hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        if self.start is None:
            self.hooks.append(module.register_forward_hook(answer))
            return
        blocks = blocks_of(module)
        norm = next(getattr(module, found) for found in NORMS if hasattr(module, found))
        entered = blocks[self.start].register_forward_pre_hook(enter, with_kwargs=True)
        if self.tail:
            following = blocks[-self.tail]
            left = following.register_forward_pre_hook(leave_into_block, with_kwargs=True)
        else:
            left = norm.register_forward_pre_hook(leave_into_norm)
        self.hooks += [entered, left]

    def value(self, stream: str, computed: torch.Tensor) -> torch.Tensor:
        entry = fitted(self.entry[stream], computed)
        name, step, ordinal = self.place
        points = self.held.setdefault((name, ordinal, stream), [])
        if not self.reused[self.place]:
            points.append((step, computed - entry))
            return computed
        last, residual = points[-1]
        if self.linear and len(points) > 1:
            earlier, older = points[-2]
            residual = residual + (residual - older) * (step - last) / (last - earlier)
        return entry + residual


def replayed(
    tiny: Any,
    rows: Any,
    start: int | None,
    tail: int = 0,
    linear: bool = False,
    **changes: Any,
) -> torch.Tensor:
    replay = Replay(tiny.pipe, rows, start, tail, linear)
    try:
        return run(tiny, **changes)
    finally:
        for hook in replay.hooks:
            hook.remove()


def start_of(name: str, tiny: Any) -> int | None:
    if name == "easycache" or not blocks_of(next(iter(denoisers(tiny.pipe).values()))):
        return None
    return 1 if name in {"firstblockcache", "dicache"} else 0


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


@one_span
def test_reuse_equals_the_replay(name, tiny) -> None:
    with accel.patched(tiny.pipe, make(name, ACTIVE)) as handle:
        result = run(tiny)
        rows = handle.report().rows
    assert any(row.verdict == "reused" for row in rows)
    assert_close(result, replayed(tiny, rows, start_of(name, tiny)))


@pytest.mark.parametrize("reuse", [accel.Taylor(1), accel.Newton(1)])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("plaincycle", family) for family in ("flux_cfg", "sd3", "wan22", "latte", "sdxl")),
        *(("firstblockcache", family) for family in ("flux_cfg", "wan22", "hunyuan_video")),
        ("easycache", "cogvideox"),
    ],
)
def test_extrapolation_equals_the_replay(name, family, reuse) -> None:
    tiny, _ = built(family)
    method = dataclasses.replace(make(name, ACTIVE), reuse=reuse)
    with accel.patched(tiny.pipe, method) as handle:
        result = run(tiny, num_inference_steps=12)
        rows = handle.report().rows
    assert any(row.verdict == "extrapolated" for row in rows)
    assert_close(
        result, replayed(tiny, rows, start_of(name, tiny), linear=True, num_inference_steps=12)
    )


def blocks_run(tiny: Any) -> int:
    """How many blocks (or block-less denoisers) really run in one call."""
    ran = [0]

    def count(*_: Any) -> None:
        ran[0] += 1

    modules = denoisers(tiny.pipe).values()
    watched = [part for module in modules for part in (blocks_of(module) or [module])]
    hooks = [part.register_forward_pre_hook(count) for part in watched]
    run(tiny)
    for hook in hooks:
        hook.remove()
    return ran[0]


@functools.cache
def untouched_blocks(family: str) -> int:
    return blocks_run(built(family)[0])


@pairs
def test_the_report_counts_what_really_ran(name, tiny) -> None:
    untouched = untouched_blocks(family_of(tiny))
    with accel.patched(tiny.pipe, make(name, ACTIVE)) as handle:
        ran = blocks_run(tiny)
        report = handle.report()
    assert sum(row.blocks for row in report.rows) == untouched
    assert sum(row.blocks_run for row in report.rows) == ran
    assert report.share_computed == ran / untouched


@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("probe", [1, 2])
@pytest.mark.parametrize("family", [name for name in TINY if name not in {*UNETS, "latte"}])
def test_probe_and_tail_blocks_run_and_get_every_stream(family, probe, tail) -> None:
    tiny, _ = built(family)
    method = accel.FirstBlockCache(threshold=1e6, probe_blocks=probe, tail_blocks=tail, max_skips=1)
    with accel.patched(tiny.pipe, method) as handle:
        result = run(tiny)
        rows = handle.report().rows
    reused = [row for row in rows if row.verdict == "reused"]
    assert reused
    assert {row.blocks_run for row in reused} == {probe + tail}
    assert_close(result, replayed(tiny, rows, probe, tail))

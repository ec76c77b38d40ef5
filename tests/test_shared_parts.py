"""Pipelines that share parts, parts that are exchanged, copies, nested runs and foreign caches."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from contract_cases import ACTIVE, make
from tiny_pipelines import TINY, Tiny, built, run

import accel

CYCLE = accel.PlainCycle(interval=2)
HOLD = accel.PlainCycle(interval=100)


def sibling(tiny: Tiny, kind: Any = diffusers.FluxPipeline, **changes: Any) -> Tiny:
    """Another pipeline object made of the same components."""
    parts = {**tiny.pipe.components, **changes}
    parts = {name: part for name, part in parts.items() if part is not None}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, tiny.call)


def test_copy_of_a_patched_pipeline_is_a_plain_pipeline() -> None:
    tiny = TINY["wan21"]()
    before = type(tiny.pipe)
    accel.patch(tiny.pipe, CYCLE)
    wanted = run(tiny)
    twin = Tiny(copy.deepcopy(tiny.pipe), tiny.call)
    assert type(twin.pipe) is before
    assert type(twin.pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(accel.AccelError, match="is not patched"):
        accel.stats(twin.pipe)
    assert torch.equal(run(twin), built("wan21")[1])
    assert torch.equal(run(tiny), wanted)
    accel.patch(twin.pipe, CYCLE)
    assert torch.equal(run(twin), wanted)


def test_a_shared_denoiser_is_patched_through_one_pipeline_only() -> None:
    tiny = TINY["flux"]()
    other = sibling(tiny)
    accel.patch(tiny.pipe, CYCLE)
    with pytest.raises(accel.AccelError, match="patched already"):
        accel.patch(other.pipe, CYCLE)
    wanted = run(tiny)
    assert accel.stats(tiny.pipe).hit_rate == 0.5
    accel.unpatch(tiny.pipe)
    accel.patch(other.pipe, CYCLE)
    assert torch.equal(run(other), wanted)


def test_runs_of_a_sibling_leave_later_runs_alone() -> None:
    """An unpatched pipeline may share the patched one's scheduler; nobody ends its runs."""
    tiny = TINY["flux"]()
    shares_all = sibling(tiny)
    own = sibling(tiny, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    untouched = run(own, seed=7)
    accel.patch(tiny.pipe, HOLD)
    wanted = run(tiny)
    run(shares_all)
    assert torch.equal(run(own, seed=7), untouched)
    assert torch.equal(run(tiny), wanted)


def test_a_denoiser_called_by_hand_is_untouched() -> None:
    tiny = TINY["wan21"]()
    seen: list[dict[str, Any]] = []
    hook = tiny.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    run(tiny)
    hook.remove()
    with torch.no_grad():
        wanted = tiny.pipe.transformer(**seen[-1])[0]
        accel.patch(tiny.pipe, HOLD)
        run(tiny)
        rows = len(accel.stats(tiny.pipe).rows)
        assert torch.equal(tiny.pipe.transformer(**seen[-1])[0], wanted)
    assert len(accel.stats(tiny.pipe).rows) == rows


def test_an_exchanged_denoiser_is_not_ignored_in_silence(caplog) -> None:
    """Either the new denoiser is cached too, or somebody says that it is not."""
    tiny, other = TINY["wan21"](), TINY["wan21"]()
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    old = tiny.pipe.transformer
    tiny.pipe.transformer = other.pipe.transformer
    try:
        run(tiny)
        noticed = accel.stats(tiny.pipe).hit_rate == 0.5 or "transformer" in caplog.text
    except accel.AccelError as error:
        noticed = "transformer" in str(error)
    assert noticed
    accel.unpatch(tiny.pipe)
    for module in (old, other.pipe.transformer):
        assert type(module) is diffusers.WanTransformer3DModel
        assert not any("accel" in key for part in module.modules() for key in vars(part))
    assert torch.equal(run(tiny), built("wan21")[1])


@pytest.mark.parametrize("name", ["magcache", "easycache", "plaincycle"])
def test_a_run_inside_a_run_of_another_pipeline(name) -> None:
    outer, inner = TINY["wan21"](), TINY["wan21"]()
    accel.patch(outer.pipe, make(name, ACTIVE))
    accel.patch(inner.pipe, CYCLE)
    wanted, nested = run(outer), run(inner, seed=3)
    verdicts = accel.stats(outer.pipe).verdicts

    def run_inner(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            assert torch.equal(run(inner, seed=3), nested)
        return kwargs

    assert torch.equal(run(outer, callback_on_step_end=run_inner), wanted)
    assert accel.stats(outer.pipe).verdicts == verdicts


def test_interrupting_a_run_politely() -> None:
    tiny = TINY["wan21"]()

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._interrupt = True
        return kwargs

    accel.patch(tiny.pipe, CYCLE)
    wanted = run(tiny)
    run(tiny, callback_on_step_end=interrupt)
    assert accel.stats(tiny.pipe).verdicts["transformer/cond"] == "CRCR"
    assert torch.equal(run(tiny), wanted)


def test_a_patched_pipeline_can_be_forgotten() -> None:
    tiny = TINY["wan21"]()
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    transformer = weakref.ref(tiny.pipe.transformer)
    del tiny
    gc.collect()
    assert transformer() is None


@pytest.mark.parametrize(
    "method",
    [
        accel.TGate(gate=0.5, warmup=1, interval=2),
        accel.CfgCache(interval=2, start=0.0),
        accel.AdaptiveGuidance(threshold=-1.0, warmup=1),
        accel.LinearAG(),
        accel.EasyCache(threshold=0.5, warmup=2),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("family", ["wan21", "sd15"])
def test_a_run_leaves_no_tensors_behind(family, method) -> None:
    """But its schedule's timesteps and noise levels."""
    tiny = TINY[family]()

    run(tiny)

    def held() -> int:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    with accel.patched(tiny.pipe, method, guard=True) as handle:
        before = held()
        run(tiny)
        assert handle.methods  # what was measured is settled
        assert held() - before <= 2


def test_moving_to_another_dtype_between_runs() -> None:
    tiny, wide = TINY["sd15"](), TINY["sd15"]()
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    tiny.pipe.to(torch.float64)
    wide.pipe.to(torch.float64)
    accel.patch(wide.pipe, CYCLE)
    result = run(tiny)
    assert result.dtype == torch.float64
    assert torch.equal(result, run(wide))


FOREIGN_CACHE_AFTER_PATCHING = """
import diffusers, torch
from tiny_pipelines import TINY, run
import accel

tiny = TINY["wan21"]()
untouched = run(tiny)
accel.patch(tiny.pipe, accel.PlainCycle(interval=1))
tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
assert torch.equal(run(tiny), untouched)
tiny.pipe.transformer.disable_cache()
accel.unpatch(tiny.pipe)
assert torch.equal(run(tiny), untouched)
"""


@pytest.mark.slow
def test_diffusers_own_cache_attaches_to_patched_blocks() -> None:
    """In a process of its own: diffusers fills its table of block classes on first use."""
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN_CACHE_AFTER_PATCHING],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("family", "kind", "strength", "steps"),
    [
        ("flux", diffusers.FluxImg2ImgPipeline, 0.4, 4),
        ("flux", diffusers.FluxImg2ImgPipeline, 1.0, 8),
        ("sd15", diffusers.StableDiffusionImg2ImgPipeline, 0.4, 3),
        ("sd15", diffusers.StableDiffusionImg2ImgPipeline, 1.0, 8),
    ],
)
def test_image_to_image_identity_is_bit_exact(family, kind, strength, steps) -> None:
    tiny = TINY[family]()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {} if family == "flux" else {"requires_safety_checker": False}
    pipe = kind(**tiny.pipe.components, **settings)
    pipe.set_progress_bar_config(disable=True)
    sizes = () if family == "flux" else ("height", "width")
    call = {key: value for key, value in tiny.call.items() if key not in sizes}
    both = Tiny(pipe, call | {"image": image, "strength": strength})
    plain = run(both)
    with accel.patched(pipe, accel.PlainCycle(interval=1)) as handle:
        assert torch.equal(run(both), plain)
        assert list(handle.report().verdicts.values()) == ["C" * steps]
    with accel.patched(pipe, accel.EasyCache(threshold=1e6, warmup=2)) as handle:
        run(both)
        assert list(handle.report().verdicts.values()) == ["CC" + "R" * (steps - 3) + "C"]

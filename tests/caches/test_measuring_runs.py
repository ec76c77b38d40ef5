"""What a measuring run leaves behind: numbers of whole runs, and no tensor."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_pipelines import built, run

import accel

STEPS = 16


def interrupted(pipe, step, timestep, tensors):
    """A callback by which the run ends early."""
    if step == 3:
        pipe._interrupt = True
    return tensors


def alive() -> int:
    """Tensors larger than a table of the scheduler."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(each.numel() > 2 * STEPS for each in found)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("wan22", accel.DPCache()),
        ("wan21", accel.DPCache()),
        ("wan21", accel.ERTACache()),
        ("wan21", accel.TeaCache()),
        ("wan21", accel.MagCache()),
        ("wan21", accel.SmoothCache()),
        ("wan21", accel.ToCa()),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_no_tensor_stays_alive(family, method) -> None:
    tiny, _ = built(family)
    run(tiny, num_inference_steps=STEPS)
    before = alive()
    with accel.patched(tiny.pipe, method):
        run(tiny, num_inference_steps=STEPS, callback_on_step_end=interrupted)
        assert alive() <= before
        run(tiny, num_inference_steps=STEPS)
        assert alive() <= before


def test_samples_are_dropped_once_the_schedules_are_made() -> None:
    tiny, _ = built("wan21")
    before = alive()
    with accel.patched(tiny.pipe, accel.BAC()) as handle:
        run(tiny)
        assert handle.methods[0].schedules
        assert alive() <= before


MEASURING = [accel.MagCache(), accel.TeaCache(), accel.BlockCaching(), accel.DPCache()]


@pytest.mark.parametrize("method", MEASURING, ids=lambda each: type(each).__name__)
def test_an_interrupted_run_has_not_measured(method) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, method) as handle:
        run(tiny, num_inference_steps=STEPS, callback_on_step_end=interrupted)
        assert handle.methods == (method,)
        run(tiny, num_inference_steps=STEPS)
        assert not handle.methods[0].unmeasured
        assert handle.report().share_computed == 1.0


def test_tables_of_an_older_run_are_not_mixed_in() -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.MagCache()) as handle:
        run(tiny, num_inference_steps=STEPS, callback_on_step_end=interrupted)
        run(tiny, num_inference_steps=STEPS, guidance_scale=1.0)
        assert set(handle.methods[0].ratios) == {"cond"}

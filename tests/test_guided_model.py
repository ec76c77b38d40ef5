"""A guided model: its scale, what a run of it holds, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipelines import built

import accel
from accel import guided_model
from accel.guided_model import GuidedModel


@pytest.mark.parametrize(("name", "scale"), [("sd15", 7.5), ("wan21", 5.0)])
def test_without_call_settings_the_scale_is_the_pipelines_own(name, scale, tmp_path) -> None:
    assert model(name, tmp_path).own_scale == scale


def test_what_was_recorded_is_predicted_again(tmp_path) -> None:
    guided = model("wan21", tmp_path)
    guided.call |= {"height": 32, "width": 32, "num_frames": 5}
    pool = guided.states(["a cat", "a dog"], 3.0, 2, torch.Generator().manual_seed(0))
    assert len(pool.cond) == 2 * 2, "steps × prompts"
    with torch.no_grad():
        again = guided.predict(pool.fixed | pool.inputs)
    torch.testing.assert_close(again, pool.cond)
    assert not torch.allclose(pool.cond, pool.uncond)
    assert not guided.module._forward_hooks


def test_a_run_that_does_not_guide_is_refused_and_leaves_no_hook(tmp_path, monkeypatch) -> None:
    guided = model("wan21", tmp_path)
    guided.call |= {"height": 32, "width": 32, "num_frames": 5}
    monkeypatch.setattr(guided_model.Recorder, "__call__", lambda *_: None)
    with pytest.raises(accel.AccelError, match="WanPipeline did not guide"):
        guided.states(["a cat"], 3.0, 1, torch.Generator())
    assert not guided.module._forward_hooks


def model(name: str, folder: Path) -> GuidedModel:
    built(name)[0].pipe.save_pretrained(folder)
    return GuidedModel(str(folder), "cpu")

"""What policies look at: the picture alone, where its tokens are known."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_kontext import kontext
from tiny_parts import Tiny
from tiny_pipelines import built, run

import accel
from accel.caches import sea_cache

SEA = accel.SeaCache(threshold=0.3)


@pytest.mark.parametrize("columns", [24, 32])
def test_maps_leave_reference_pictures_out(columns, monkeypatch) -> None:
    seen, inner = set(), sea_cache._Filtered._filter

    def look(self: sea_cache._Filtered, maps: torch.Tensor, *rest: float) -> torch.Tensor:
        seen.add((maps.shape[1], *maps.shape[-2:]))
        return inner(self, maps, *rest)

    monkeypatch.setattr(sea_cache._Filtered, "_filter", look)
    tiny = kontext(columns=columns)
    with accel.patched(tiny.pipe, SEA) as handle:
        assert torch.isfinite(run(tiny)).all()
        assert 0 < handle.report().hit_rate < 1
    assert seen == {(1, 4, 8)}


def test_tokens_that_lie_nowhere_known_are_refused() -> None:
    """LTX's pipeline with conditions gives coordinates, and no rows and columns."""
    tiny, _ = built("ltx")
    pipe = diffusers.LTXConditionPipeline(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call | {"image": torch.zeros(1, 3, 32, 32), "frame_index": 0}
    with (
        accel.patched(pipe, SEA),
        pytest.raises(accel.AccelError, match=r"LTXVideo.*is not known, which SeaCache needs"),
    ):
        run(Tiny(pipe, call))

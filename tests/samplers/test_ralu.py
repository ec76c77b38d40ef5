"""RALU: the published schedule, its extremes are plain two-stage runs, edges choose the regions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_pipelines import built, run

import accel
from accel import RALU, AccelError
from accel.layout import Layout
from accel.noise_levels import NoiseLevels
from accel.samplers.ralu import edge_pixels
from accel.staging import stage

SIZE = {"height": 32, "width": 32}
FAST = RALU(
    shares=(0.2, 0.3, 0.5), ends=(0.2, 0.3), shifts=(8.14, 2.86, 2.19), jump=6.26, ratio=0.3
)


def levels(steps: int = 10) -> NoiseLevels:
    sigmas = tuple(1 - step / steps for step in range(steps + 1))
    return NoiseLevels("flow", "velocity", sigmas, 1000)


def test_the_schedule_of_flux_at_seven_times() -> None:
    """Worked out by hand from the paper's numbers."""
    stages = FAST.stages(levels())
    wanted = [
        (1, 0.9417, 0.8),
        (0.9616, 0.8946, 0.8101, 0.7),
        (0.9359, 0.8336, 0.7052, 0.5390, 0.3158, 0),
    ]
    for found, expected in zip(stages, wanted, strict=True):
        assert found.sigmas == pytest.approx(expected, abs=5e-4)
    assert [each.scale for each in stages] == [0.5, 0.5, 1.0]


@dataclasses.dataclass(frozen=True)
class TwoStages(RALU):
    """T2 without any choice of regions."""

    def attach(self, denoiser):
        return stage(denoiser, self, self.positions)

    def cross(self, crossing):
        full = crossing.grid(1.0)
        layout = Layout.resized(full, full)
        return layout, crossing.repeat(layout)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_extremes_are_plain_two_stage_runs(ratio) -> None:
    tiny, _ = built("flux_cfg")
    settings = {**vars(FAST), "ratio": ratio}
    results = []
    for method in (RALU(**settings), TwoStages(**settings)):
        with accel.patched(tiny.pipe, method):
            results.append(run(tiny, **SIZE))
    assert torch.equal(*results)


@pytest.mark.parametrize("regions", ["edges", "random"])
@pytest.mark.parametrize("positions", ["native", "spread"])
def test_token_counts_coordinates_and_seeds(regions, positions) -> None:
    """64 full tokens: 16 coarse; 4 of them split make 28; then all 64."""
    tiny, _ = built("flux_cfg")
    seen: list[torch.Tensor] = []

    def note(_, args, kwargs):
        assert kwargs["hidden_states"].shape[1] == len(kwargs["img_ids"])
        seen.append(kwargs["img_ids"])

    method = dataclasses.replace(FAST, regions=regions, positions=positions)
    untouched = run(tiny, **SIZE)
    hook = tiny.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with accel.patched(tiny.pipe, method, accel.PlainCycle(interval=2)):
            first = run(tiny, **SIZE)
            counts = [len(each) for each in seen]
            assert torch.equal(run(tiny, **SIZE), first)
            assert not torch.equal(run(tiny, seed=1, **SIZE), first)
    finally:
        hook.remove()
    assert set(counts) == {16, 28, 64}
    mixed = next(each for each in seen if len(each) == 28)
    assert len(mixed.unique(dim=0)) == 28
    fractions = (mixed[:, 1:] % 1).unique().tolist()
    assert fractions == [0.0, 0.5]
    assert torch.isfinite(first).all()
    assert torch.equal(run(tiny, **SIZE), untouched)


def test_edges_are_found_where_the_picture_changes() -> None:
    picture = torch.zeros(1, 32, 32)
    picture[:, 8:24, 8:24] = 255.0
    edges = edge_pixels(picture)[0]
    rows, columns = edges.nonzero().unbind(1)
    assert len(rows) >= 4 * 14
    inside = (rows >= 7) & (rows <= 24) & (columns >= 7) & (columns <= 24)
    on_border = (rows <= 8) | (rows >= 23) | (columns <= 8) | (columns >= 23)
    assert bool((inside & on_border).all())
    assert not edge_pixels(picture / 255 * 20).any(), "below the weak threshold"


def test_what_ralu_cannot_do_is_refused() -> None:
    with pytest.raises(AccelError, match="coordinates"):
        accel.patch(built("sd3")[0].pipe, RALU())
    with pytest.raises(AccelError, match="jump"):
        RALU(jump=1.5)
    with pytest.raises(AccelError, match="ends"):
        RALU(ends=(0.5, 0.4))
    tiny, _ = built("flux")
    with accel.patched(tiny.pipe, RALU()), pytest.raises(AccelError, match="too few"):
        run(tiny, num_inference_steps=2)

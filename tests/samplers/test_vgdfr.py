"""VGDFR: what is merged, what is encoded, and that the clip keeps its length."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel import VGDFR, AccelError
from accel.samplers.vgdfr import _averaged, _blended, similarity

FRAMES = {"wan21": 9, "wan22": 9, "hunyuan_video": 25}


def clip(frames: int, still: set[int]) -> torch.Tensor:
    """(1, 3, frames, 16, 16): noise that stays the same from each frame in `still` to the next."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(1, 3, 16, 16, generator=generator)]
    for frame in range(1, frames):
        new = torch.rand(1, 3, 16, 16, generator=generator)
        parts.append(parts[-1] if frame - 1 in still else new)
    return torch.stack(parts, 2) * 2 - 1


def test_still_pairs_merge_most_similar_first() -> None:
    """Latent factor 2: latent pair (3, 4) holds frames 5 to 8, two still neighbours."""
    pictures = clip(9, {5, 7})
    assert VGDFR(keep=0.6, tail=0, similarity=0.9).merged(pictures, 2, 5) == {3}
    assert VGDFR(keep=0.8, tail=0).merged(pictures, 2, 5) == {3}
    assert VGDFR(keep=0.6, tail=0, similarity=-1.0).merged(pictures, 2, 5) == {1, 3}
    assert VGDFR(keep=0.6, tail=1, similarity=0.9).merged(pictures, 2, 5) == set()
    assert VGDFR(keep=1.0, tail=0).merged(pictures, 2, 5) == set()
    assert similarity(pictures[:, :, :2], pictures[:, :, :2]) == pytest.approx(1.0)


def test_averaging_and_blending_keep_still_clips() -> None:
    still = clip(1, set()).expand(-1, -1, 9, -1, -1)
    short = _averaged(still, {1, 3}, 2)
    assert short.shape[2] == 5
    assert torch.equal(_blended(short, [0, 1, 3], 5, 2), still)


def test_blended_frames_lie_at_their_own_times() -> None:
    """A clip whose brightness is its time: averages stand between their frames."""
    line = torch.arange(9.0).reshape(1, 1, 9, 1, 1)
    short = _averaged(line, {3}, 2)
    assert short.flatten().tolist() == [0, 1, 2, 3, 4, 5.5, 7.5]
    found = _blended(short, [0, 1, 2, 3], 5, 2).flatten().tolist()
    assert found[:5] == [0, 1, 2, 3, 4]
    assert found[6:8] == pytest.approx([6, 7])
    assert found[8] == 7.5, "nothing lies after the last frame"


@pytest.mark.parametrize("name", FRAMES)
def test_a_run_without_merging_is_the_untouched_one(name) -> None:
    tiny, _ = built(name)
    frames = {"num_frames": FRAMES[name]}
    untouched = run(tiny, **frames)
    with accel.patched(tiny.pipe, VGDFR(similarity=2.0)):
        assert torch.equal(run(tiny, **frames), untouched)


@pytest.mark.parametrize("layers", [(), (0, 2), "all"])
@pytest.mark.parametrize("name", FRAMES)
def test_merged_runs_keep_the_clips_length(name, layers) -> None:
    tiny, _ = built(name)
    call = {"num_frames": FRAMES[name], "output_type": "np"}
    untouched = run(tiny, **call)
    method = VGDFR(keep=0.6, tail=0, similarity=-1.0, global_layers=layers)
    lengths: set[int] = set()
    hooks = [
        tiny.pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.add(kwargs["hidden_states"].shape[2]), with_kwargs=True
        )
    ]
    try:
        with accel.patched(tiny.pipe, method, accel.PlainCycle(interval=2)):
            first = run(tiny, **call)
            assert torch.equal(run(tiny, **call), first)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(lengths) == 2
    assert first.shape == untouched.shape
    assert torch.isfinite(first).all()
    assert torch.equal(run(tiny, **call), untouched)


def test_global_layers_see_the_frames_own_times() -> None:
    tiny, _ = built("wan21")
    call = {"num_frames": 9}
    results = []
    for layers in ((), "all"):
        method = VGDFR(keep=0.6, tail=0, similarity=-1.0, global_layers=layers)
        with accel.patched(tiny.pipe, method):
            results.append(run(tiny, **call))
    assert not torch.equal(*results)
    with pytest.raises(AccelError, match="only 4 blocks"):
        accel.patch(tiny.pipe, VGDFR(global_layers=(9,)))


def test_pictures_and_wrong_settings_are_refused() -> None:
    with pytest.raises(AccelError, match="video models"):
        accel.patch(built("flux")[0].pipe, VGDFR())
    for wrong in ({"keep": 0.2}, {"look": 0}, {"tail": -1}, {"global_layers": "some"}):
        with pytest.raises(AccelError):
            VGDFR(**wrong)


@pytest.mark.parametrize("name", FRAMES)
def test_a_vae_in_half_precision_is_given_its_own_type(name) -> None:
    tiny = TINY[name]()
    tiny.pipe.vae.to(torch.bfloat16)
    call = {"num_frames": FRAMES[name]}
    with accel.patched(tiny.pipe, VGDFR(keep=0.6, tail=0, similarity=-1.0)):
        made = run(tiny, **call)
    assert made.dtype == torch.float32
    assert torch.isfinite(made).all()

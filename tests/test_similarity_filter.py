"""Static scenes are left out, moving ones are not."""

from __future__ import annotations

import pytest
import torch

import accel
from accel.similarity_filter import SimilarityFilter


def share_skipped(frames, **options) -> float:
    chosen = SimilarityFilter(**options)
    return sum(chosen.skip(frame) for frame in frames) / len(frames)


def test_a_static_scene_is_left_out_but_for_forced_frames() -> None:
    frame = torch.rand(3, 16, 16)
    assert share_skipped([frame] * 1100) == pytest.approx(10 / 11, abs=0.01)


def test_a_scene_of_one_colour_is_static_too() -> None:
    assert share_skipped([torch.full((3, 16, 16), 0.4)] * 1100) > 0.8


def test_a_small_thing_that_moves_before_a_bright_ground_is_seen() -> None:
    frames = []
    for number in range(300):
        frame = torch.full((3, 64, 64), 0.8)
        left = number * 5 % 48
        frame[:, 24:40, left : left + 16] = 0.3
        frames.append(frame)
    assert share_skipped(frames) < 0.05


def test_unlike_frames_are_all_processed() -> None:
    generator = torch.Generator().manual_seed(0)
    assert share_skipped([torch.rand(3, 16, 16, generator=generator) for _ in range(200)]) == 0


def test_the_chance_grows_with_the_likeness() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(3, 32, 32, generator=generator)
    noisy = [
        [
            (base + size * torch.randn(base.shape, generator=generator)).clamp(0, 1)
            for _ in range(300)
        ]
        for size in (0.01, 0.025, 0.035)
    ]
    shares = [share_skipped(frames) for frames in noisy]
    assert shares[0] > shares[1] > shares[2]


def test_off_and_wrong_settings() -> None:
    frame = torch.rand(3, 8, 8)
    assert share_skipped([frame] * 20, threshold=1) == 0
    assert share_skipped([frame] * 20, most=0) == 0
    for wrong in ({"threshold": 2}, {"threshold": float("nan")}, {"most": -1}):
        with pytest.raises(accel.AccelError, match=next(iter(wrong))):
            SimilarityFilter(**wrong)

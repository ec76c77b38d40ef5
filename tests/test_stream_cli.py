"""`accel stream` redraws a folder or a video, a picture for every frame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import built
from typer.testing import CliRunner

import accel
from accel import cli, loading
from accel.frame_sources import frames

COUNT, SIZE = 6, 32


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "frames"
    place.mkdir()
    values = np.random.default_rng(0)
    for number in range(COUNT):
        array = (values.random((40, 48, 3)) * 255).astype(np.uint8)
        Image.fromarray(array).save(place / f"{number}.png")
    return place


def call(source, output, *options):
    arguments = ["stream", "-m", "tiny", "-p", "a cat", "-i", source, "-o", output]
    size = ["--height", SIZE, "--width", SIZE]
    return CliRunner().invoke(cli.app, [str(each) for each in (*arguments, *size, *options)])


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_every_frame_becomes_a_picture(kind, tmp_path, monkeypatch, request) -> None:
    monkeypatch.setattr(loading, "load", lambda *args: (built("sd15")[0].pipe, {}, None))
    result = call(request.getfixturevalue(kind), tmp_path / "out")
    assert json.loads(result.stdout)["frames"] == COUNT
    assert json.loads(result.stdout)["left_out"] == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{number:06d}.png" for number in range(COUNT)]


def test_a_source_that_breaks_ends_the_stream_with_its_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *args: (built("sd15")[0].pipe, {}, None))
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"nothing")
    result = call(wrong, tmp_path / "out")
    assert isinstance(result.exception, accel.AccelError)
    assert "not a video" in str(result.exception)


def test_frames_are_resized_and_in_order(folder, video) -> None:
    found = list(frames(video, 16, 24))
    assert [each.size for each in found] == [(24, 16)] * COUNT
    levels = [np.asarray(each).mean() for each in found]
    assert levels == sorted(levels)
    assert len(list(frames(folder, 16, 24))) == COUNT


def test_missing_sources_are_named(tmp_path) -> None:
    with pytest.raises(accel.AccelError, match="no such file"):
        next(frames(tmp_path / "none", 8, 8))
    with pytest.raises(accel.AccelError, match="no pictures"):
        next(frames(tmp_path, 8, 8))

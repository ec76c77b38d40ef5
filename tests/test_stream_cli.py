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
from accel.frame_sources import frames, picture

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


def test_pictures_of_any_kind_become_rgb(tmp_path) -> None:
    gray = np.full((8, 8), 30000, np.uint16)
    Image.fromarray(gray).save(tmp_path / "16.png")
    turned = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    about = turned.getexif()
    about[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=about)
    assert np.asarray(picture(tmp_path / "16.png", 8, 8)).max() == 30000 // 256
    shown = np.asarray(picture(tmp_path / "turned.png", 8, 8))
    assert np.array_equal(shown, np.asarray(turned)[::-1, ::-1])
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(accel.AccelError, match=r"broken\.png: cannot be read"):
        list(frames(tmp_path, 8, 8))


def test_wrong_options_are_named_before_anything_runs(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *args: pytest.fail("nothing should be loaded"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.png").write_bytes(b"kept")
    wrong = call(folder, out)
    assert "holds frames of an earlier run" in str(wrong.exception)
    assert "--indices" in str(call(folder, tmp_path / "new", "--indices", "32;45").exception)
    assert "is a file" in str(call(folder, out / "000000.png").exception)
    assert call(folder, tmp_path / "new", "--similarity", "1.5").exit_code == 2


def test_an_earlier_run_is_dropped_when_asked(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *args: (built("sd15")[0].pipe, {}, None))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("000099.png", "notes.png"):
        (out / name).write_bytes(b"earlier")
    assert call(folder, out, "--overwrite").exit_code == 0
    names = {file.name for file in out.iterdir()}
    assert names == {*(f"{number:06d}.png" for number in range(COUNT)), "notes.png"}


def test_missing_sources_are_named(tmp_path) -> None:
    with pytest.raises(accel.AccelError, match="no such file"):
        next(frames(tmp_path / "none", 8, 8))
    with pytest.raises(accel.AccelError, match="no pictures"):
        next(frames(tmp_path, 8, 8))

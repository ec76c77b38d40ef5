"""Files come back with their metadata, and are whole or not there."""

import builtins

import numpy as np
import pytest
from PIL import Image

from accel import AccelError, media

METADATA = {"prompt": "é 红 😀", "seed": 3, "steps": 50, "model": "zoo:x", "methods": ["MagCache"]}


def frames(count: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_png_keeps_pixels_and_metadata(tmp_path) -> None:
    path = media.save_image(tmp_path / "deep" / "a.png", frames()[0], METADATA)
    assert np.array_equal(np.asarray(Image.open(path)), frames()[0])
    assert media.read_metadata(path) == METADATA
    assert "é 红 😀" in Image.open(path).info["parameters"]


def test_mp4_keeps_frames_and_metadata(tmp_path) -> None:
    import av

    smooth = np.full((5, 32, 32, 3), 90, np.uint8)
    path = media.save_video(tmp_path / "a.mp4", smooth, 8, METADATA)
    assert media.read_metadata(path) == METADATA
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 5
    assert np.abs(np.stack(decoded).astype(int) - 90).max() < 6


def test_video_without_pyav_becomes_an_animated_png(tmp_path, monkeypatch, caplog) -> None:
    real_import = builtins.__import__

    def no_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_av)
    path = media.save_video(tmp_path / "a.mp4", frames(), 8, METADATA)
    assert path.suffix == ".png"
    assert "PyAV is absent" in caplog.text
    with Image.open(path) as image:
        assert image.n_frames == 5
    assert media.read_metadata(path) == METADATA


def test_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch) -> None:
    path = media.save_image(tmp_path / "a.png", frames()[0], METADATA)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        media.save_image(path, frames()[1], METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_and_missing_files_are_named(tmp_path) -> None:
    Image.fromarray(frames()[0]).save(tmp_path / "plain.png")
    with pytest.raises(AccelError, match="not written by accel"):
        media.read_metadata(tmp_path / "plain.png")
    with pytest.raises(AccelError, match="no such file"):
        media.read_metadata(tmp_path / "none.png")
    for number, comment in enumerate(("Created with GIMP", "123", "[]", "{}")):
        file = tmp_path / f"{number}.gif"
        Image.fromarray(frames()[0]).save(file, comment=comment.encode())
        with pytest.raises(AccelError, match="not written by accel"):
            media.read_metadata(file)


def test_a_video_of_odd_size_is_not_lost(tmp_path, caplog) -> None:
    pytest.importorskip("av")
    odd = np.arange(2 * 9 * 8 * 3, dtype=np.uint8).reshape(2, 9, 8, 3)
    file = media.save_video(tmp_path / "a.mp4", odd, 8, METADATA)
    assert file.name == "a.png" and "MP4 needs even sizes" in caplog.text
    assert media.read_metadata(file) == METADATA
    with Image.open(file) as kept:
        assert kept.size == (8, 9) and kept.n_frames == 2


def test_side_by_side_doubles_the_width() -> None:
    joined = media.side_by_side(frames(), frames(), zoom=2)
    assert joined.shape == (5, 64, 128, 3)
    assert np.array_equal(joined[:, ::2, :64:2], frames())


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_animations_keep_frames_and_metadata(tmp_path, suffix) -> None:
    path = media.save_video(tmp_path / f"a.{suffix}", frames(), 10, METADATA)
    with Image.open(path) as image:
        assert image.format == suffix.upper()
        assert image.n_frames == 5
        assert image.info["duration"] == 100
    assert media.read_metadata(path) == METADATA

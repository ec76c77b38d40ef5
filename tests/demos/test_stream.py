"""The demo's stream without a browser: sources, pace, words that change, stopping."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import accel
from accel import demo_stream
from accel.demo_stream import MOST, SIZE, Shown, Streams

COUNT = 6


@pytest.fixture(scope="module")
def streams() -> Streams:
    return Streams()


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        grey = Image.new("RGB", (50, 40), (40 * number,) * 3)
        grey.save(tmp_path / f"{number}.png")
    return tmp_path


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if "stream" in each.name or "feed" in each.name]


def test_pictures_come_out_beside_what_entered(streams, folder) -> None:
    seen = list(streams.start("apple", sorted(folder.glob("*.png")), similarity=1))
    assert [shown.taken for shown in seen] == list(range(1, COUNT + 1))
    assert [int(shown.entered.mean()) for shown in seen] == [40 * n for n in range(COUNT)]
    assert {shown.picture.shape for shown in seen} == {(SIZE, SIZE, 3)}
    assert seen[-1].left_out == 0 and seen[-1].rate > 0
    assert not threads()


def test_a_video_is_a_source(streams, video) -> None:
    assert len(list(streams.start("apple", [video], similarity=1))) == COUNT


def test_the_words_may_change_while_it_runs(streams) -> None:
    def third(prompt: str) -> np.ndarray:
        run = streams.start("apple on a blue background", similarity=1)
        for shown in run:
            if shown.taken == 1:
                run.prompt(prompt)
            if shown.taken == 12:
                run.stop()
                return shown.picture.astype(int)
        raise AssertionError

    same, other = third("apple on a blue background"), third("frog on a red background")
    assert abs(same - other).mean() > 2
    assert abs(same - third("apple on a blue background")).mean() == 0


def test_a_resting_scene_is_left_out(streams) -> None:
    run = streams.start("apple", similarity=0.98)
    left_out = {}
    for shown in run:
        left_out[shown.taken] = shown.left_out
        if shown.taken == 80:  # the camera's scene rests in the second half
            break
    run.stop()
    moving, resting = left_out[40], left_out[80] - left_out[40]
    assert moving < 8 and resting > 25
    assert shown.share_left_out == left_out[80] / 80


def test_stopping_ends_both_threads(streams) -> None:
    run = streams.start("apple")
    pictures = iter(run)
    next(pictures)
    run.stop()
    assert run.stopped and not threads()
    assert len(list(pictures)) <= 3  # what was drawn already
    abandoned = iter(streams.start("apple"))
    next(abandoned)
    abandoned.close()  # as when a browser's tab is closed
    assert not threads()


def test_the_camera_is_endless_but_a_stream_is_not(monkeypatch, streams) -> None:
    assert MOST > 100
    monkeypatch.setattr(demo_stream, "MOST", 5)
    assert len(list(streams.start("apple", similarity=1))) == 5


def test_what_is_wrong_is_said(streams, folder) -> None:
    with pytest.raises(accel.AccelError, match="must not be empty"):
        streams.start("  ")
    with pytest.raises(accel.AccelError, match=r"accepted are 0\.5 to 1"):
        streams.start("apple", similarity=2)
    with pytest.raises(accel.AccelError, match="tokens; the text encoder reads"):
        streams.start("apple " * 2000)
    (folder / "9.png").write_bytes(b"nothing")
    with pytest.raises(accel.AccelError, match=r"9\.png: cannot be read"):
        list(streams.start("apple", sorted(folder.glob("*.png")), similarity=1))
    (folder / "9.mp4").write_bytes(b"nothing")
    with pytest.raises(accel.AccelError, match="not a video"):
        list(streams.start("apple", [folder / "9.mp4"]))
    assert not threads()


def test_the_tab_shows_and_stops(streams, monkeypatch) -> None:
    pytest.importorskip("gradio")
    from accel import demo_stream_tab

    monkeypatch.setattr(demo_stream_tab, "REDRAW", 0.0)
    tab = demo_stream_tab.StreamTab(streams)
    visitor = SimpleNamespace(session_hash="one")
    going = tab._watch("apple", None, 0.98, visitor)
    assert "loading" in next(going)[2]
    _, picture, status, figures = next(going)
    assert picture.shape == (512, 512, 3)
    assert "frame 1" in status and "frames a second" in figures and "left out" in figures
    tab._reprompt("frog on a red background", visitor)
    assert "Stopped" in tab._stop(visitor)
    rest = list(going)
    assert len(rest) <= 4 and "Stopped" in rest[-1][2], "after all that was still under way"
    assert "Nothing" in tab._stop(visitor) and not threads()
    tab._reprompt("nobody streams", visitor)


def test_a_stream_that_is_stopped_while_it_loads_does_not_run(streams, monkeypatch) -> None:
    pytest.importorskip("gradio")
    from accel import demo_stream_tab

    tab = demo_stream_tab.StreamTab(streams)
    visitor, start = SimpleNamespace(session_hash="one"), streams.start
    said = []

    def slow(*args: Any) -> Any:
        said.append(tab._stop(visitor))
        return start(*args)

    monkeypatch.setattr(streams, "start", slow)
    assert "Stopped" in list(tab._watch("apple", None, 0.98, visitor))[-1][2]
    assert "Stopped" in said[0] and not threads()


def test_a_rate_before_the_second_picture_is_nothing() -> None:
    empty = np.zeros((1, 1, 3), np.uint8)
    assert Shown(empty, empty, 1, 0, 0.0).rate == 0.0

"""The streaming pipeline on tiny U-Net pipelines, frame by frame and on its own thread."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import built

import accel
from accel.pipelines.stream import StreamPipeline
from accel.similarity_filter import SimilarityFilter
from accel.stream_session import Session

SIZE = 32


def stream(family: str = "sd15", **options) -> StreamPipeline:
    pipe = built(family)[0].pipe
    size = {"height": SIZE, "width": SIZE}
    return StreamPipeline(pipe, "a cat", "a dog", **{**size, "indices": (20, 35, 45), **options})


def frames(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_frame_comes_out_once_and_in_order(family) -> None:
    redrawn = stream(family)
    drawn = [each for frame in frames(5) if (each := redrawn.step(frame)) is not None]
    assert [each.frame for each in drawn] == [0, 1, 2]
    drawn += list(redrawn.drain())
    assert [each.frame for each in drawn] == [0, 1, 2, 3, 4]
    assert all(each.picture.shape == (SIZE, SIZE, 3) for each in drawn)
    assert all(each.picture.dtype == np.uint8 for each in drawn)


@pytest.mark.parametrize("guidance", ["none", "self", "onetime", "full"])
def test_together_and_level_by_level_agree(guidance) -> None:
    made = []
    for together in (True, False):
        redrawn = stream(guidance=guidance, together=together)
        out = [redrawn.step(frame) for frame in frames(4)]
        made.append([*filter(None, out), *redrawn.drain()])
    for one, other in zip(*made, strict=True):
        difference = one.picture.astype(int) - other.picture.astype(int)
        assert np.abs(difference).max() <= 1


def test_prompts_change_while_it_runs_and_the_negative_acts() -> None:
    first, second = (
        stream(guidance="full", guidance_scale=4),
        stream(guidance="full", guidance_scale=4),
    )
    for frame in frames(3):
        same = first.step(frame), second.step(frame)
    assert np.array_equal(same[0].picture, same[1].picture)
    second.prompt("a cat", "a bird in the snow")
    (frame,) = frames(1)
    assert not np.array_equal(first.step(frame).picture, second.step(frame).picture)


def test_pictures_arrays_and_tensors_are_the_same_frame() -> None:
    array = (np.random.default_rng(0).random((SIZE, SIZE, 3)) * 255).astype(np.uint8)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    made = [
        stream(indices=(40,)).step(frame).picture
        for frame in (array, tensor, Image.fromarray(array))
    ]
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


@pytest.mark.parametrize("left_out", ["0010", "0111111100", "01010101", "0110111010001"])
def test_left_out_frames_take_their_place_in_the_row(left_out) -> None:
    """Every frame leaves in order, as late as any; one left out has the picture before it."""
    plain, redrawn = stream(), stream()
    marks = iter(left_out)
    redrawn.similarity = SimpleNamespace(skip=lambda _: next(marks) == "1")
    given = frames(len(left_out))
    drawn = [redrawn.step(frame) for frame in given]
    assert drawn[:2] == [None, None]
    assert [each.frame for each in drawn[2:]] == list(range(len(given) - 2))
    found = [*drawn[2:], *redrawn.drain()]
    assert [each.frame for each in found] == list(range(len(given)))
    assert "".join(str(int(each.repeated)) for each in found) == left_out
    kept = [frame for frame, mark in zip(given, left_out, strict=True) if mark == "0"]
    alone = [*filter(None, map(plain.step, kept)), *plain.drain()]
    wanted = iter(alone)
    for each in found:
        last = last if each.repeated else next(wanted).picture  # noqa: F821 (the first is kept)
        assert np.abs(each.picture.astype(int) - last).max() <= 1, "rows of a batch round alike"


def test_a_filter_serves_one_stream_after_the_other() -> None:
    known = SimilarityFilter()
    stream(similarity=known).step(frames(1)[0])
    other = stream(similarity=known)
    assert other.similarity is not known and known._last is None


def test_like_frames_repeat_the_last_picture() -> None:
    redrawn = stream(similarity=SimilarityFilter(most=4))
    (frame,) = frames(1)
    drawn = [redrawn.step(frame) for _ in range(13)]
    assert drawn[:2] == [None, None]
    assert [each.frame for each in drawn[2:]] == list(range(11))
    assert sum(each.repeated for each in drawn[2:]) >= 6


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_killed_consumer_loses_and_reorders_nothing(taken) -> None:
    session = Session(stream(), depth=2)
    found: list[int] = []

    def consume(count: int) -> None:
        """A consumer that dies after some pictures."""
        for drawn in session:
            found.append(drawn.frame)
            if len(found) == count:
                return

    given = iter(frames(12))
    for _ in range(6):
        session.put(next(given))
    if taken:
        consume(taken)
    for frame in given:
        consume(len(found) + 1)
        session.put(frame)
    session.close()
    consume(10**6)
    assert found == list(range(12))


def test_back_pressure_when_nobody_takes_pictures() -> None:
    session = Session(stream(indices=(40,)), depth=1)
    (frame,) = frames(1)
    with pytest.raises(queue.Full):
        for _ in range(10):
            session.put(frame, timeout=2)
    session.stop()
    with pytest.raises(accel.AccelError, match="closed"):
        session.put(frame)


def test_an_error_reaches_both_sides() -> None:
    session = Session(stream(), depth=2)
    session.put(torch.rand(3, 8, 8))
    with pytest.raises(accel.AccelError, match="this stream takes"):
        list(session)
    with pytest.raises(accel.AccelError, match="this stream takes"):
        for _ in range(10):
            session.put(torch.rand(3, SIZE, SIZE), timeout=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 33}, "divisible by"),
        ({"indices": ()}, "indices="),
        ({"indices": (50,)}, "indices="),
        ({"indices": (45, 32)}, "falling"),
        ({"guidance": "half"}, "onetime"),
    ],
)
def test_wrong_settings_are_named(options, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        stream(**options)


def test_long_prompts_and_transformers_are_refused() -> None:
    with pytest.raises(accel.AccelError, match="tokens; the text encoder reads"):
        StreamPipeline(built("sd15")[0].pipe, "a cat " * 200, height=SIZE, width=SIZE)
    with pytest.raises(accel.AccelError, match="FluxPipeline has none"):
        StreamPipeline(built("flux")[0].pipe, "a cat", height=SIZE, width=SIZE)

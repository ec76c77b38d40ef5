"""The demo's stream: frames redrawn as they come, in threads that can be stopped.

Knows no web page: `Streams.start` gives a `Run`, whose iteration yields what a page shows.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from accel import frame_sources, model_zoo, registry
from accel.method import AccelError
from accel.similarity_filter import SimilarityFilter
from accel.stream_session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

MODEL, LORA = "emoji-unet", "lcm.safetensors"
SIZE = 64
"""Height and width of the frames, in pixels."""
LEVELS = (10, 20, 32, 45)
MOST = 2000
"""Frames of one stream: the camera would never end."""


@dataclass(frozen=True)
class Shown:
    """A drawn frame beside the one that entered, (height, width, 3) bytes, and the stream so far.

    `seconds` since the first picture, which waits for the levels to fill.
    """

    entered: Frames
    picture: Frames
    taken: int
    left_out: int
    seconds: float

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return (self.taken - 1) / self.seconds if self.seconds else 0.0

    @property
    def share_left_out(self) -> float:
        """Of all frames, those that the similarity filter left out."""
        return self.left_out / self.taken


class Run:
    """A stream from a source of frames. Iterate for what is `Shown`; ends when the source does."""

    def __init__(self, stream: Any, source: Iterator[Image.Image]) -> None:
        self._stream = stream
        self._session = Session(stream, depth=2)
        self._entered: dict[int, Frames] = {}
        self.stopped = False
        """Whether somebody asked it to stop."""
        self._over = threading.Event()
        self._feeder = threading.Thread(target=self._feed, args=(source,), daemon=True)
        self._feeder.start()

    def prompt(self, prompt: str) -> None:
        """Change the prompt; the next frame is drawn with it."""
        self._stream.prompt(checked(prompt))

    def stop(self) -> None:
        """End at once, and wait until both threads are gone."""
        self.stopped = True
        self._end()

    def __iter__(self) -> Iterator[Shown]:
        """Every picture in order; raises what the source or the network raised."""
        began, left_out = 0.0, 0
        try:
            for taken, drawn in enumerate(self._session, 1):
                began = began or time.perf_counter()
                left_out += drawn.repeated
                entered = self._entered.pop(drawn.frame)
                seconds = time.perf_counter() - began
                yield Shown(entered, drawn.picture, taken, left_out, seconds)
        finally:
            self._end()

    def _end(self) -> None:
        self._over.set()
        self._session.stop()
        self._feeder.join()

    def _feed(self, source: Iterator[Image.Image]) -> None:
        try:
            for number, frame in enumerate(itertools.islice(source, MOST)):
                self._entered[number] = np.asarray(frame)
                self._session.put(frame)
            self._session.close()
        except BaseException as error:
            if not self._over.is_set():  # else the session was closed under it
                self._session.fail(error)


class Streams:
    """Loads the zoo's U-Net with its consistency LoRA once and begins streams with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: Any = None

    def start(self, prompt: str, files: Sequence[Path] = (), similarity: float = 0.98) -> Run:
        """Redraw `files` (a video, or pictures in the order of their names), or the camera.

        `similarity` of frames that are left out: 0.5 to 1, which leaves none out.
        """
        if not 0.5 <= similarity <= 1:
            raise AccelError(f"similarity={similarity}: accepted are 0.5 to 1")
        source = pictures(files) if files else camera()
        stream = registry.pipeline("stream")(
            self._loaded(),
            checked(prompt),
            height=SIZE,
            width=SIZE,
            indices=LEVELS,
            similarity=SimilarityFilter(similarity),
        )
        return Run(stream, source)

    def _loaded(self) -> Any:
        with self._lock:
            if self._pipe is None:
                pipe = model_zoo.load(MODEL)[0]
                try:
                    pipe.load_lora_weights(model_zoo.path(MODEL) / "adapters", weight_name=LORA)
                except (ImportError, ValueError) as error:
                    raise AccelError(
                        f"the stream's LoRA cannot be loaded: {error}; pip install "
                        "'diffusers-accel[demo]'"
                    ) from error
                pipe.fuse_lora()
                self._pipe = pipe
            return self._pipe


def checked(prompt: str) -> str:
    """The prompt, or `AccelError` where there is none."""
    if not prompt.strip():
        raise AccelError("the prompt must not be empty")
    return prompt


def pictures(files: Sequence[Path]) -> Iterator[Image.Image]:
    """Frames of a video, or pictures in the order of their names."""
    for file in sorted(files, key=lambda each: each.name):
        if file.suffix.lower() in frame_sources.SUFFIXES:
            yield frame_sources.picture(file, SIZE, SIZE)
        else:
            yield from frame_sources.frames(file, SIZE, SIZE)


def camera() -> Iterator[Image.Image]:
    """An endless scene: a disc that wanders for 40 frames and rests for 40, with sensor noise."""
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for number in itertools.count():
        period, within = divmod(number, 80)
        angle = (40 * period + min(within, 40)) / 4
        place = SIZE / 2 + SIZE / 4 * np.array([np.sin(angle), np.cos(angle)])
        inside = np.hypot(rows - place[0], columns - place[1]) < SIZE / 4
        scene = np.where(inside[..., None], (225, 60, 40), (70, 120, 200))
        grain = noise.normal(0, 2, scene.shape)
        yield Image.fromarray((scene + grain).clip(0, 255).astype(np.uint8))

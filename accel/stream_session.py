"""A stream on a thread of its own: frames are handed in, drawn and taken beside each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from accel.method import AccelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Drawn:
    """One picture of the stream: (height, width, 3) bytes, and the number of its frame.

    `repeated`: the frame was left out for its likeness, and the picture is the last one again.
    """

    frame: int
    picture: NDArray[np.uint8]
    repeated: bool = False


class Stream(Protocol):
    """What draws: see `accel.pipelines.stream.StreamPipeline`."""

    def step(self, frame: Any) -> Drawn | None:
        """A frame enters; the picture that leaves, if any."""
        ...

    def drain(self) -> Iterator[Drawn]:
        """The pictures still in flight."""
        ...


class Session:
    """A stream on a thread of its own, with bounded queues on both sides.

    `put` waits while the stream is behind, the stream waits while nobody takes its pictures. A
    consumer may stop at any time and another go on: pictures come in order, each once. `close` ends
    the stream and lets the frames in flight come out.
    """

    def __init__(self, stream: Stream, depth: int = 4) -> None:
        self.stream = stream
        self._in: queue.Queue[Any] = queue.Queue(depth)
        self._out: queue.Queue[Drawn | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="accel stream", daemon=True)
        self._thread.start()

    def put(self, frame: Any, timeout: float | None = None) -> None:
        """Hand in a frame; raises `queue.Full` after `timeout` seconds without room."""
        if self._ended:
            self._raise_error()
            raise AccelError("this stream was closed")
        if not self._enter(frame, timeout):
            self._raise_error()
            raise AccelError("this stream was closed")

    def close(self) -> None:
        """No more frames come; what is in flight still comes out."""
        if not self._ended:
            self._ended = True
            if not self._enter(_END, None):
                self._raise_error()

    def _enter(self, item: Any, timeout: float | None) -> bool:
        """Whether the stream still took it."""
        waited = 0.0
        while self._thread.is_alive():
            try:
                self._in.put(item, timeout=_WAIT)
                return True
            except queue.Full:
                waited += _WAIT
                if timeout is not None and waited >= timeout:
                    raise
        return False

    def fail(self, error: BaseException) -> None:
        """The source broke: what is in flight comes out, then `error` is raised to the consumer.

        An error of the network that came before stays the one that is raised.
        """
        self._error = self._error or error
        if not self._ended:
            self._ended = True
            self._enter(_END, None)

    def stop(self) -> None:
        """End at once; what was not taken is dropped."""
        self._ended = True
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Drawn]:
        """Pictures in order until the stream is closed and empty."""
        while True:
            drawn = self._out.get()
            if drawn is None:
                self._out.put(None)  # for the next consumer
                self._raise_error()
                return
            yield drawn

    def _work(self) -> None:
        try:
            while (frame := self._take()) is not _END:
                drawn = self.stream.step(frame)
                if drawn is not None:
                    self._give(drawn)
            for drawn in self.stream.drain():
                self._give(drawn)
        except _Stopped:
            pass
        except BaseException as error:  # given to whoever takes the next picture
            self._error = error
        finally:
            self._force_end()

    def _take(self) -> Any:
        while not self._stopped.is_set():
            try:
                return self._in.get(timeout=_WAIT)
            except queue.Empty:
                continue
        raise _Stopped

    def _give(self, drawn: Drawn) -> None:
        while not self._stopped.is_set():
            try:
                return self._out.put(drawn, timeout=_WAIT)
            except queue.Full:
                continue
        raise _Stopped

    def _force_end(self) -> None:
        while True:
            try:
                return self._out.put(None, timeout=_WAIT)
            except queue.Full:
                if self._stopped.is_set():
                    self._out.get_nowait()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


_END = object()
_WAIT = 0.05
"""Seconds between looks at whether the other side is still there."""


class _Stopped(Exception):  # noqa: N818 (not an error: how the thread ends)
    """`stop` was called."""

"""Streaming on emoji-unet: stream batch against level by level, the similarity filter, a soak.

python benchmarks/stream.py benchmarks/results/emoji-unet-stream.json --soak 10000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from accel import model_zoo
from accel.pipelines.stream import StreamPipeline
from accel.similarity_filter import SimilarityFilter
from accel.stream_session import Session

SIZE, FOUR = 64, (0, 16, 32, 45)
PROMPT = "apple on a blue background"


def main() -> None:
    """Measure everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--soak", type=int, default=10_000, help="frames")
    parser.add_argument("--frames", type=int, default=32, help="of a timing")
    options = parser.parse_args()
    pipe = model_zoo.load("emoji-unet")[0]
    result = {
        "command": f"python benchmarks/stream.py {options.output} --soak {options.soak}",
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "stream_batch": batch(pipe, options.frames),
        "similarity_filter": similarity(pipe),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    result["soak"] = soak(pipe, options.soak)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["soak"]))


def moving(count: int) -> list[torch.Tensor]:
    """A square that crosses a ground whose colour turns."""
    frames = []
    for number in range(count):
        frame = torch.full((3, SIZE, SIZE), 0.2)
        frame[number // 40 % 3] = 0.6
        left = number * 5 % 40
        frame[:, 16:48, left : left + 24] = torch.rand(
            3, 1, 1, generator=torch.Generator().manual_seed(number // 4)
        )
        frames.append(frame)
    return frames


def batch(pipe: Any, count: int) -> dict[str, Any]:
    """Seconds a frame of both ways, alternating; four levels, three kinds of guidance."""
    found = {}
    for guidance in ("none", "self", "onetime"):
        size = {"height": SIZE, "width": SIZE, "indices": FOUR, "guidance": guidance}
        ways = {
            together: StreamPipeline(pipe, PROMPT, together=together, **size)
            for together in (True, False)
        }
        seconds = {True: [], False: []}
        for _ in range(6):
            for together, stream in ways.items():
                began = time.perf_counter()
                for frame in moving(count):
                    stream.step(frame)
                seconds[together].append((time.perf_counter() - began) / count)
        ratios = [
            slow / fast for slow, fast in zip(seconds[False][1:], seconds[True][1:], strict=True)
        ]
        found[guidance] = {
            "speedup": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "frames_per_second": 1 / statistics.median(seconds[True][1:]),
        }
    return found


def similarity(pipe: Any) -> dict[str, float]:
    """Share of frames left out of a static and of a moving scene, 300 frames each."""
    shares = {}
    for name, frames in (("static", moving(1) * 300), ("moving", moving(300))):
        stream = StreamPipeline(
            pipe, PROMPT, height=SIZE, width=SIZE, similarity=SimilarityFilter()
        )
        drawn = [stream.step(frame) for frame in frames]
        shares[name] = sum(each.repeated for each in drawn if each is not None) / len(frames)
    return shares


def soak(pipe: Any, count: int) -> dict[str, Any]:
    """Memory of the process while `count` frames run through a session, in order."""
    session = Session(StreamPipeline(pipe, PROMPT, height=32, width=32, indices=(32, 45)))
    frame = torch.rand(3, 32, 32)

    def feed() -> None:
        for _ in range(count):
            session.put(frame)
        session.close()

    threading.Thread(target=feed).start()
    memory, expected = [], 0
    for drawn in session:
        assert drawn.frame == expected
        expected += 1
        if drawn.frame % (count // 10) == 0:
            memory.append(round(resident() / 2**20, 1))
    return {"frames": expected, "in_order": True, "resident_mib": memory}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()

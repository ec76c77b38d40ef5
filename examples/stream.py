"""Redraw moving pictures frame by frame: python examples/stream.py out/"""

import sys
import threading
from pathlib import Path

import torch
from PIL import Image

from accel import model_zoo
from accel.pipelines.stream import StreamPipeline
from accel.similarity_filter import SimilarityFilter
from accel.stream_session import Session

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
pipe = model_zoo.load("emoji-unet")[0]
stream = StreamPipeline(
    pipe, "apple on a blue background", height=64, width=64, similarity=SimilarityFilter()
)
session = Session(stream)


def camera() -> None:
    """A bright square that wanders."""
    for place in range(24):
        frame = torch.full((3, 64, 64), 0.2)
        frame[0, 16:48, place : place + 32] = 1.0
        session.put(frame)
    session.close()


threading.Thread(target=camera).start()
for drawn in session:
    Image.fromarray(drawn.picture).save(output / f"frame-{drawn.frame:03d}.png")
print(f"wrote {drawn.frame + 1} pictures to {output}")

"""`accel stream`: redraw a video or a folder of pictures, frame by frame as it comes."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def stream(
    model: Annotated[str, typer.Option("-m", "--model", help="zoo:NAME, a folder or a repository")],
    prompt: Annotated[str, typer.Option("-p", "--prompt")],
    source: Annotated[Path, typer.Option("-i", "--input", help="a video or a folder of pictures")],
    output: Annotated[Path, typer.Option("-o", "--output", help="a folder for PNG files")],
    negative_prompt: Annotated[str, typer.Option()] = "",
    lora: Annotated[list[str] | None, typer.Option(help="of few steps; fused; repeatable")] = None,
    height: Annotated[int | None, typer.Option(min=8)] = None,
    width: Annotated[int | None, typer.Option(min=8)] = None,
    indices: Annotated[str, typer.Option(help="levels in a table of 50, with commas")] = "32,45",
    guidance: Annotated[str, typer.Option(help="none, self, onetime or full")] = "self",
    guidance_scale: Annotated[float, typer.Option()] = 1.2,
    similarity: Annotated[
        float, typer.Option(min=0, max=1, help="of left-out frames; 1: off")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 2,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="frames of an earlier run")
    ] = False,
) -> None:
    """Redraw frames by a stream batch; prints frames a second and how many were left out."""
    from PIL import Image

    from accel import loading, registry
    from accel.frame_sources import frames
    from accel.method import AccelError
    from accel.similarity_filter import SimilarityFilter
    from accel.stream_session import Session

    if output.exists() and not output.is_dir():
        raise AccelError(f"--output {output}: is a file; a folder is accepted")
    earlier = [*output.glob("[0-9]" * 6 + ".png")]
    if earlier and not overwrite:
        raise AccelError(
            f"--output {output}: holds frames of an earlier run; --overwrite drops them"
        )
    try:
        levels = tuple(int(index) for index in indices.split(","))
    except ValueError as error:
        raise AccelError(f"--indices {indices!r}: write whole numbers such as 32,45") from error
    pipe, call, _ = loading.load(model, loading.Loading(lora=tuple(lora or [])))
    if lora:
        pipe.fuse_lora()
    size = {"height": height or call.get("height", 512), "width": width or call.get("width", 512)}
    redrawn = registry.pipeline("stream")(
        pipe,
        prompt,
        negative_prompt,
        **size,
        indices=levels,
        guidance=guidance,
        guidance_scale=guidance_scale,
        similarity=SimilarityFilter(similarity) if similarity < 1 else None,
        seed=seed,
    )
    session, began = Session(redrawn), time.perf_counter()
    feeder = threading.Thread(target=_feed, args=(session, frames(source, **size)), daemon=True)
    feeder.start()
    output.mkdir(parents=True, exist_ok=True)
    for file in earlier:
        file.unlink()
    counts = {"frames": 0, "left_out": 0}
    for drawn in session:
        Image.fromarray(drawn.picture).save(output / f"{counts['frames']:06d}.png")
        counts["frames"] += 1
        counts["left_out"] += drawn.repeated
    feeder.join()
    rate = counts["frames"] / (time.perf_counter() - began)
    print(json.dumps({**counts, "frames_per_second": rate}), file=sys.stdout)


def _feed(session: Any, source: Any) -> None:
    try:
        for frame in source:
            session.put(frame)
        session.close()
    except BaseException as error:
        session.fail(error)

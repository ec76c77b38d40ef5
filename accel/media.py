"""Pictures and videos on disk, with the metadata that makes them again.

Files are written under a temporary name, flushed and renamed: a file is whole or not there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

from accel.method import AccelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

logger = logging.getLogger(__name__)
KEY = "accel"
ENCODING = {"crf": "12", "threads": "4", "x264-params": "mbtree=0"}
"""Equal frames give equal bytes: the number of threads is a constant, and x264's macroblock tree is
off because its assembler gave other bytes from run to run on small frames."""
VIDEO_FORMATS = ("mp4", "gif", "png")


def save_image(path: Path, picture: Frames, metadata: dict[str, Any]) -> Path:
    """PNG of a (height, width, 3) picture; metadata as JSON in `accel` and text in `parameters`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(metadata, ensure_ascii=False))
    info.add_itxt("parameters", _parameters(metadata))
    image = Image.fromarray(picture)
    return _atomically(path, lambda part: image.save(part, format="PNG", pnginfo=info))


def save_video(path: Path, frames: Frames, fps: int, metadata: dict[str, Any]) -> Path:
    """MP4, GIF or animated PNG by the suffix: (frames, height, width, 3).

    Animated PNG too where MP4 cannot be: without PyAV, and at odd sizes.
    """
    if path.suffix != ".mp4":
        return _save_animation(path, frames, fps, metadata)
    try:
        import av  # noqa: F401
    except ImportError:
        logger.warning(
            "PyAV is absent: writing an animated PNG (pip install 'diffusers-accel[video]')"
        )
        return _save_animation(path.with_suffix(".png"), frames, fps, metadata)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        logger.warning("MP4 needs even sizes: writing %d×%d as an animated PNG", width, height)
        return _save_animation(path.with_suffix(".png"), frames, fps, metadata)
    return _atomically(path, lambda part: _encode(part, frames, fps, metadata))


def save(stem: Path, array: Frames, fps: int, video_format: str, metadata: dict[str, Any]) -> Path:
    """A picture as PNG or a video in `video_format`, by the axes; `stem` has no suffix."""
    if array.ndim == 3:
        return save_image(stem.with_name(f"{stem.name}.png"), array, metadata)
    return save_video(stem.with_name(f"{stem.name}.{video_format}"), array, fps, metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that this package wrote into a PNG, GIF or MP4."""
    if not path.is_file():
        raise AccelError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".mp4":
            import av

            with av.open(str(path)) as container:
                text = container.metadata.get(KEY)
        else:
            with Image.open(path) as image:
                text = image.info.get("comment" if image.format == "GIF" else KEY)
    except (OSError, ValueError, ImportError) as error:
        raise AccelError(f"{path}: cannot be read ({error})") from error
    try:
        found: dict[str, Any] = json.loads(text or "")
    except (ValueError, TypeError):
        found = {}
    if not isinstance(found, dict) or not found:
        raise AccelError(f"{path}: was not written by accel (no {KEY!r} metadata)")
    return found


def side_by_side(left: Frames, right: Frames, zoom: int = 1) -> Frames:
    """Two pictures or videos beside each other, each pixel enlarged `zoom` times."""
    joined = np.concatenate((left, right), axis=-2)
    return joined.repeat(zoom, axis=-3).repeat(zoom, axis=-2)


def _save_animation(path: Path, frames: Frames, fps: int, metadata: dict[str, Any]) -> Path:
    text = json.dumps(metadata, ensure_ascii=False)
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    kind = path.suffix.removeprefix(".").upper()
    about = {"comment": text.encode()} if kind == "GIF" else {"pnginfo": info}
    first, *rest = [Image.fromarray(frame) for frame in frames]
    options = {"save_all": True, "append_images": rest, "duration": 1000 / fps, "loop": 0}
    return _atomically(path, lambda part: first.save(part, format=kind, **about, **options))


def _encode(part: Path, frames: Frames, fps: int, metadata: dict[str, Any]) -> None:
    import av

    options = {"movflags": "use_metadata_tags"}
    with av.open(str(part), "w", format="mp4", options=options) as container:
        container.metadata[KEY] = json.dumps(metadata, ensure_ascii=False)
        container.metadata["comment"] = _parameters(metadata)
        stream = container.add_stream("libx264", rate=fps, options=ENCODING)
        height, width = frames.shape[1:3]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _atomically(path: Path, write: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _parameters(metadata: dict[str, Any]) -> str:
    """What common viewers and web interfaces read: prompt, negative prompt, `Key: value`."""
    call = metadata.get("call") or {}
    size = f"{call['width']}x{call['height']}" if {"width", "height"} <= set(call) else None
    known = {
        "Steps": metadata.get("steps"),
        "CFG scale": call.get("true_cfg_scale", call.get("guidance_scale")),
        "Seed": metadata.get("seed"),
        "Size": size,
        "Model": metadata.get("model"),
        "Acceleration": " + ".join(metadata.get("methods") or ()) or None,
    }
    settings = ", ".join(f"{key}: {value}" for key, value in known.items() if value is not None)
    negative = call.get("negative_prompt")
    lines = [
        metadata.get("prompt", ""),
        f"Negative prompt: {negative}" if negative else "",
        settings,
    ]
    return "\n".join(line for line in lines if line)

"""Frames of a video file or of a folder of pictures, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from accel.method import AccelError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def picture(file: Path, height: int, width: int) -> Image.Image:
    """A picture's file as RGB of height × width, turned as its EXIF says; 16 bits become 8."""
    try:
        with Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I"):
                turned = Image.fromarray((np.asarray(turned) // 256).clip(0, 255).astype(np.uint8))
            return turned.convert("RGB").resize((width, height))
    except (OSError, Image.DecompressionBombError) as error:
        raise AccelError(f"{file.name}: cannot be read ({error})") from error


def frames(source: Path, height: int, width: int) -> Iterator[Image.Image]:
    """RGB pictures of height × width; a folder's files in the order of their names."""
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise AccelError(f"{source}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            yield picture(file, height, width)
        return
    if not source.is_file():
        raise AccelError(f"{source}: no such file or folder")
    try:
        import av
    except ImportError as error:
        raise AccelError(
            "reading videos needs PyAV: pip install 'diffusers-accel[video]'"
        ) from error
    try:
        with av.open(str(source)) as container:
            for frame in container.decode(video=0):
                image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
                yield image.convert("RGB").resize((width, height))
    except (av.FFmpegError, IndexError) as error:
        raise AccelError(f"{source}: not a video that can be read ({error})") from error

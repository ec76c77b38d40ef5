"""Pictures, motions and captions of the model zoo: Noto emoji on coloured grounds, moving.

The pictures come from the npm package `emoji-datasource-google@16.0.0` (Noto Emoji, Apache-2.0);
they are fetched into a cache folder and never committed.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

PACKAGE = "emoji-datasource-google@16.0.0"
CACHE = Path.home() / ".cache" / "accel-zoo"

_EMOJI = Path(__file__).with_name("emoji.txt").read_text(encoding="utf-8").split()
CODEPOINTS: dict[str, str] = dict(zip(_EMOJI[::2], _EMOJI[1::2], strict=True))
NAMES: list[str] = list(CODEPOINTS)
FIRST_NAMES: list[str] = NAMES[:64]
"""What emoji-image and emoji-video know, which were trained before there were more."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "red": (205, 50, 50),
    "green": (50, 160, 70),
    "blue": (50, 80, 200),
    "yellow": (240, 210, 60),
    "purple": (130, 60, 160),
    "gray": (130, 130, 130),
}
COLOUR_NAMES: list[str] = list(COLOURS)

MOTIONS: dict[str, str] = {
    "left": "sliding left",
    "right": "sliding right",
    "up": "sliding up",
    "down": "sliding down",
    "spin": "spinning",
    "grow": "growing",
    "shrink": "shrinking",
    "bounce": "bouncing",
    "wobble": "wobbling",
}
MOTION_NAMES: list[str] = list(MOTIONS)

RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first of two objects lies, seen from the second: across, down."""

_FILLER = ["a", "on", "background"]
_PHRASES = [*MOTIONS.values(), *RELATIONS]
VOCABULARY: list[str] = sorted(
    {*NAMES, *COLOUR_NAMES, *_FILLER, *(word for phrase in _PHRASES for word in phrase.split())}
)
"""Every word a caption may hold; the tokenizers know exactly these."""


def caption(name: str, colour: str, motion: str | None = None) -> str:
    """`"apple on a blue background sliding left"`; without the motion for pictures."""
    still = f"{name} on a {colour} background"
    return f"{still} {MOTIONS[motion]}" if motion else still


def parse(text: str) -> tuple[str, str, str | None]:
    """The (name, colour, motion) that a caption of one object was made of."""
    words = text.split()
    motion = next((key for key, phrase in MOTIONS.items() if text.endswith(phrase)), None)
    return words[0], words[3], motion


def pair_caption(first: str, relation: str, second: str, colour: str) -> str:
    """`"apple left of a dog on a blue background"`."""
    return f"{first} {relation} a {second} on a {colour} background"


def parse_pair(text: str) -> tuple[str, str, str, str] | None:
    """The (first, relation, second, colour) of a caption of two objects, None of one."""
    objects, _, ground = text.partition(" on a ")
    first, _, rest = objects.partition(" ")
    relation, _, second = rest.rpartition(" a ")
    return (first, relation, second, ground.split()[0]) if relation else None


def held_out(*parts: str | None) -> bool:
    """Whether a whole combination is never shown in training (one in eight).

    parts: name, colour and motion, or first, relation, second and colour.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return digest[0] % 8 == 0


def fetch(cache: Path = CACHE) -> Path:
    """The folder with the 64×64 pictures, fetched from the npm registry when absent."""
    folder = cache / "package" / "img" / "google" / "64"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=cache, check=True)
        with tarfile.open(next(cache.glob("emoji-datasource-google-*.tgz"))) as archive:
            archive.extractall(cache, filter="data")
    return folder


def sprites(cache: Path = CACHE, codepoints: list[str] | None = None) -> Tensor:
    """RGBA pictures in [0, 1], colour premultiplied by alpha: (names, 4, 64, 64)."""
    folder = fetch(cache)
    pictures = []
    for code in codepoints or list(CODEPOINTS.values()):
        with Image.open(folder / f"{code}.png") as file:
            rgba = np.asarray(file.convert("RGBA"), dtype=np.float32) / 255
        picture = torch.from_numpy(rgba).permute(2, 0, 1)
        pictures.append(torch.cat((picture[:3] * picture[3:], picture[3:])))
    return torch.stack(pictures)


def _place(pictures: Tensor, grounds: Tensor, pose: Tensor, size: int) -> Tensor:
    """Draw pictures (n, 4, 64, 64) on flat grounds (n, 3) in [0, 1]; pose as in `_moved`.

    Returns (n, 3, size, size) in [-1, 1].
    """
    drawn = _moved(pictures, pose, size)
    return (drawn[:, :3] + (1 - drawn[:, 3:]) * grounds[:, :, None, None]) * 2 - 1


def _moved(pictures: Tensor, pose: Tensor, size: int) -> Tensor:
    """Pictures (n, 4, 64, 64) at their place: (n, 4, size, size), premultiplied by alpha.

    pose (n, 4): centre x, centre y in [-1, 1], size as a share of the frame, angle in radians.
    """
    x, y, scale, angle = pose.unbind(1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack((cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y), dim=1).view(
        -1, 2, 3
    )
    fine = 2 * size
    grid = functional.affine_grid(theta, [len(pictures), 4, fine, fine], align_corners=False)
    drawn = functional.grid_sample(pictures, grid, align_corners=False, padding_mode="zeros")
    return functional.avg_pool2d(drawn, 2)


def _grounds(colours: Tensor) -> Tensor:
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    return palette[colours.cpu()]


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def render_images(
    pictures: Tensor, names: Tensor, colours: Tensor, size: int, generator: Generator
) -> Tensor:
    """Still pictures with a little freedom of place, size and angle.

    pictures: `sprites()`; names, colours: (n,) indices; returns (n, 3, size, size) in [-1, 1].
    """
    count = len(names)
    pose = torch.stack(
        (
            _uniform(count, -0.2, 0.2, generator),
            _uniform(count, -0.2, 0.2, generator),
            _uniform(count, 0.55, 0.75, generator),
            _uniform(count, -0.15, 0.15, generator),
        ),
        dim=1,
    )
    return _place(pictures[names], _grounds(colours), pose, size)


def render_pairs(
    pictures: Tensor,
    firsts: Tensor,
    relations: Tensor,
    seconds: Tensor,
    colours: Tensor,
    size: int,
    generator: Generator,
) -> Tensor:
    """Still pictures of two smaller objects, the first over the second where they touch.

    relations: (n,) indices into `RELATIONS`; everything else as in `render_images`.
    """
    count = len(firsts)
    towards = torch.tensor([*RELATIONS.values()], dtype=torch.float32)[relations]
    grounds = _grounds(colours)[:, :, None, None]
    rgb = grounds.expand(-1, -1, size, size)
    for names, side in ((seconds, -1), (firsts, 1)):
        apart = _uniform(count, 0.4, 0.5, generator)[:, None]
        beside = _uniform(count, -0.2, 0.2, generator)[:, None]
        place = side * apart * towards + beside * (1 - towards.abs())
        scale = _uniform(count, 0.38, 0.46, generator)[:, None]
        angle = _uniform(count, -0.15, 0.15, generator)[:, None]
        drawn = _moved(pictures[names], torch.cat((place, scale, angle), 1), size)
        rgb = drawn[:, :3] + (1 - drawn[:, 3:]) * rgb
    return rgb * 2 - 1


def even_times(frames: int) -> Tensor:
    """When frames at an even rate are seen, (1, frames): 0 is the motion's start, 1 its end."""
    return torch.linspace(0, 1, frames)[None]


def _tracks(motions: Tensor, times: Tensor, generator: Generator) -> Tensor:
    """Poses (n, frames, 4) for motion indices (n,), at times (n, frames)."""
    count = len(motions)
    time = times.expand(count, -1)
    frames = time.shape[1]
    x = _uniform(count, -0.12, 0.12, generator)[:, None].expand(-1, frames)
    y = _uniform(count, -0.12, 0.12, generator)[:, None].expand(-1, frames)
    scale = _uniform(count, 0.55, 0.65, generator)[:, None].expand(-1, frames)
    reach = _uniform(count, 0.38, 0.5, generator)[:, None]
    turn = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)[:, None]
    sweep = reach * (2 * time - 1)
    still = torch.zeros(count, frames)
    hop = 0.42 - 0.8 * torch.abs(torch.sin(2 * math.pi * time)) * (reach / 0.5)
    swing = 0.6 * torch.sin(4 * math.pi * time)
    moves: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {
        "left": (-sweep, y, scale, still),
        "right": (sweep, y, scale, still),
        "up": (x, -sweep, scale, still),
        "down": (x, sweep, scale, still),
        "spin": (x, y, scale, turn * 2 * math.pi * time),
        "grow": (x, y, 0.35 + 0.45 * time, still),
        "shrink": (x, y, 0.8 - 0.45 * time, still),
        "bounce": (x, hop, 0.85 * scale, still),
        "wobble": (x, y, scale, turn * swing),
    }
    poses = torch.zeros(count, frames, 4)
    for index, name in enumerate(MOTION_NAMES):
        chosen = motions == index
        poses[chosen] = torch.stack([part.expand(count, frames)[chosen] for part in moves[name]], 2)
    return poses


def render_videos(
    pictures: Tensor,
    names: Tensor,
    colours: Tensor,
    motions: Tensor,
    times: Tensor,
    size: int,
    generator: Generator,
) -> Tensor:
    """Moving pictures: (n, 3, frames, size, size) in [-1, 1]; see `render_images`.

    times: (n, frames), or (1, frames) for all; see `even_times`.
    """
    frames = times.shape[1]
    poses = _tracks(motions, times, generator).flatten(0, 1)
    repeated = pictures[names].repeat_interleave(frames, 0)
    grounds = _grounds(colours).repeat_interleave(frames, 0)
    drawn = _place(repeated, grounds, poses, size)
    return drawn.unflatten(0, (-1, frames)).transpose(1, 2)


def combinations(
    video: bool, held: bool, names: list[str] = NAMES
) -> list[tuple[str, str, str | None]]:
    """All (name, colour, motion) combinations of the training part or of the held-out part."""
    motions: list[str | None] = [*MOTION_NAMES] if video else [None]
    return [
        (name, colour, motion)
        for name in names
        for colour in COLOURS
        for motion in motions
        if held_out(name, colour, motion) == held
    ]

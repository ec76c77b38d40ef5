"""VGDFR: after a look at the predicted clip, frames that hardly change are merged."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from accel.crossing import Crossing
from accel.denoiser import Denoiser
from accel.layout import Layout
from accel.method import AccelError, Handle, check, is_count, is_number
from accel.noise_levels import NoiseLevels
from accel.stages import Stage
from accel.staging import StagedRun, stage
from accel.transitions import renoised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

WINDOW = 7


@dataclass(frozen=True)
class VGDFR:
    """Dynamic latent frame rate (Yuan et al., 2025, arXiv 2504.12259).

    After the first `look` share of the steps the clean estimate is decoded. Latent frames after the
    first are taken in pairs; where each two neighbouring frames of a pair's pictures are similar
    (SSIM), they are averaged, and the pair becomes one latent frame, encoded anew and made noisy
    with the run's own first noise. Pairs merge from the most similar on until at most `keep` of the
    latent frames are left, none below `similarity`. The last `tail` pairs never merge. After
    decoding, the frames that are missing are blended between their neighbours.

    `global_layers`: blocks that see the frames' original times in their rotary tables, the others
    see them as consecutive; "all", or numbers in calling order. The authors tested each layer of
    HunyuanVideo: 4, 19, 23, 31, 35, 36, 37, 40.

    Differs from the authors' code: the estimate is decoded at full size (they switch one stage of
    the VAE off), merging goes by rank instead of a bisected threshold, four frames never become
    one, the interpolation is linear blending, and a batch shares one plan, its least similar
    sample's. Latents (`output_type="latent"`) repeat the merged frames.
    """

    slot: ClassVar[str] = "size"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"keep": 0.9}, {}, {"keep": 0.6})

    keep: float = 0.75
    similarity: float = 0.0
    look: float = 0.1
    tail: int = 1
    global_layers: tuple[int, ...] | str = ()

    def __post_init__(self) -> None:
        check(is_number(self.keep) and 0.5 <= self.keep <= 1, self, "keep", "between 0.5 and 1")
        accepted = "an SSIM (above 1 nothing is merged)"
        check(is_number(self.similarity), self, "similarity", accepted)
        check(is_number(self.look) and 0 < self.look < 1, self, "look", "a share between 0 and 1")
        check(is_count(self.tail, 0), self, "tail", "a whole number")
        layers = self.global_layers
        right = layers == "all" or (
            not isinstance(layers, str) and all(is_count(layer, 0) for layer in layers)
        )
        check(right, self, "global_layers", '"all" or numbers of blocks')

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a video model; raises for those whose size the pipeline fixes beforehand."""
        if denoiser.family.name not in ("wan", "hunyuan_video"):
            raise AccelError(
                "VGDFR is for video models that find positions from the latent's shape (Wan, "
                f"HunyuanVideo), not {type(denoiser.module).__name__}"
            )
        if not self.global_layers:
            return stage(denoiser, self)
        times = denoiser.follow(partial(_keep_times, denoiser, self.global_layers))
        try:
            return Handle.together([times, stage(denoiser, self)])
        except BaseException:
            times.remove()
            raise

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """The run's own levels, cut after the look."""
        cut = max(round(self.look * levels.steps), 1)
        if cut >= levels.steps:
            raise AccelError(f"VGDFR: {levels.steps} steps are too few to look after {self.look:g}")
        return [Stage(levels.sigmas[: cut + 1]), Stage(levels.sigmas[cut:])]

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """Merge frames of the clean estimate, if any are similar enough."""
        full = crossing.layout.full
        pictures = crossing.decoded(crossing.form.planes(crossing.clean, full))
        factor = (pictures.shape[2] - 1) // max(full[0] - 1, 1)
        merged = self.merged(pictures, factor, full[0])
        if not merged:
            return crossing.layout, crossing.noisy
        kept = [i for i in range(full[0]) if i - 1 not in merged]
        source = torch.tensor([kept.index(i - 1 if i - 1 in merged else i) for i in range(full[0])])
        layout = Layout.frames(full, torch.tensor(kept), source)
        clip = _averaged(pictures, merged, factor)
        clip = torch.cat(
            (clip, clip[:, :, -1:].expand(-1, -1, -(clip.shape[2] - 1) % 4, -1, -1)), 2
        )
        clean = crossing.encoded(clip)[:, :, : len(kept)]  # AutoencoderKLWan takes 4 frames a time
        pixels = crossing.form.pixels(crossing.form.tokens(clean))
        weights = crossing.levels.weights(crossing.after.sigmas[0])
        noisy = renoised(pixels, crossing.noise(layout), weights)
        return layout, crossing.form.shaped(noisy, layout.grid)

    def merged(self, pictures: Tensor, factor: int, frames: int) -> set[int]:
        """First latent frame of each pair that merges, from (batch, 3, frames, height, width)."""
        pairs = list(range(1, frames - 1, 2))
        pairs = pairs[: len(pairs) - self.tail] if self.tail else pairs
        scores: list[tuple[float, int]] = []
        for pair in pairs:
            first = (pair - 1) * factor + 1
            one = pictures[:, :, first : first + 2 * factor : 2]
            two = pictures[:, :, first + 1 : first + 2 * factor : 2]
            scores.append((similarity(one, two), pair))
        most = frames - max(int(self.keep * frames), 1)
        best = sorted(scores, reverse=True)[:most]
        return {pair for score, pair in best if score >= self.similarity}

    def decode(
        self, run: StagedRun, original: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The VAE's decoding: of the live frames alone, the others blended in afterwards."""
        layout = run.layout
        if layout is None or layout.whole or layout.grid is None or run.deciding:
            return original(z, *args, **kwargs)
        cells = layout.full[1] * layout.full[2]
        kept = (layout.pick[::cells] // cells).tolist()
        output = original(z[:, :, kept], *args, **kwargs)
        video = output[0]
        factor = (video.shape[2] - 1) // max(len(kept) - 1, 1)
        whole = _blended(video, kept, layout.full[0], factor)
        return (whole,) if isinstance(output, tuple) else type(output)(whole)


def similarity(one: Tensor, two: Tensor) -> float:
    """Least mean SSIM, over samples and frames, of (batch, 3, frames, height, width) in [−1, 1]."""
    x, y = (part.transpose(1, 2).flatten(0, 1).float() for part in (one, two))
    size = min(WINDOW, *x.shape[-2:])
    mean = partial(functional.avg_pool2d, kernel_size=size, stride=1)
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    ssim = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(ssim.mean((1, 2, 3)).min())


def _averaged(pictures: Tensor, merged: set[int], factor: int) -> Tensor:
    """The clip with each two frames of the merged pairs averaged into one."""
    parts = [pictures[:, :, :1]]
    frame, latent = 1, 1
    while frame < pictures.shape[2]:
        length = factor * (2 if latent in merged else 1)
        part = pictures[:, :, frame : frame + length]
        if latent in merged:
            part = (part[:, :, ::2] + part[:, :, 1::2]) / 2
        parts.append(part)
        frame, latent = frame + length, latent + length // factor
    return torch.cat(parts, 2)


def _blended(video: Tensor, kept: list[int], frames: int, factor: int) -> Tensor:
    """All frames from the decoded ones: each output time between its two neighbours in time."""
    times = [0.0]
    for latent, after in zip(kept[1:], [*kept[2:], frames], strict=True):
        first, step = (latent - 1) * factor + 1, after - latent
        times += [first + (step - 1) / 2 + step * i for i in range(factor)]
    wanted = torch.arange((frames - 1) * factor + 1, dtype=torch.float32)
    known = torch.tensor(times)
    right = torch.searchsorted(known, wanted).clamp(1, len(times) - 1)
    share = ((wanted - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    share = share.to(video)[:, None, None]
    blended: Tensor = torch.lerp(video[:, :, right - 1], video[:, :, right], share)
    return blended


def _keep_times(denoiser: Denoiser, layers: tuple[int, ...] | str) -> Callable[[], None]:
    """Give chosen blocks rotary tables of the frames' original times."""
    tables = _Times(denoiser)
    blocks = denoiser.chain.blocks
    chosen = range(len(blocks)) if isinstance(layers, str) else layers
    if any(layer >= len(blocks) for layer in chosen):
        raise AccelError(f"VGDFR(global_layers={layers!r}): there are only {len(blocks)} blocks")
    hooks = [denoiser.module.rope.register_forward_hook(tables.made)]
    hooks += [
        blocks[layer].register_forward_pre_hook(tables.given, with_kwargs=True) for layer in chosen
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


class _Times:
    """The rotary tables of the call in flight: as the model made them, and by original time."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.local: Any = None
        self.known: Any = None
        self.busy = False

    def made(self, rope: Any, args: tuple[Any, ...], output: Any) -> None:
        """The model made its tables for the live frames: make those of all, and pick."""
        run = self.denoiser.clock.staging
        self.local = self.known = None
        if self.busy or run is None or run.layout is None or run.layout.whole:
            return
        shape = list(args[0].shape)
        shape[2] = run.layout.full[0]
        with self._silent():
            full = rope(args[0].new_empty(shape))
        cells = run.layout.full[1] * run.layout.full[2]
        kept = (run.layout.pick[::cells] // cells).to(args[0].device)
        self.local = output
        self.known = tuple(_frames(table, run.layout.full[0], kept) for table in full)

    @contextlib.contextmanager
    def _silent(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def given(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A chosen block is called: exchange the tables."""
        if self.local is None:
            return None
        changed = tuple(self.known if each is self.local else each for each in args)
        named = {k: self.known if each is self.local else each for k, each in kwargs.items()}
        return changed, named


def _frames(table: Tensor, frames: int, kept: Tensor) -> Tensor:
    """Some frames of a table (tokens, channels) or (1, tokens, 1, channels) of all."""
    axis = 1 if table.dim() == 4 else 0
    return table.unflatten(axis, (frames, -1)).index_select(axis, kept).flatten(axis, axis + 1)  # type: ignore[no-any-return]

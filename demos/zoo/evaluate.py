"""Measure a zoo model by formula: colour, motion, caption, KID, and quality against step count.

    python -m demos.zoo.evaluate --model emoji-video --steps 50 20 10 5 --json out.json

Every figure is also given for real renders of the same captions: the best that can be reached.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from accel import metrics, model_zoo
from demos.zoo import data, text

VIEWS = 24
"""Real renders of each name that the caption classifier learns from."""
REFERENCE = 256
"""Real clips that KID compares with."""


def colour_of(video: Tensor) -> str:
    """Palette colour nearest to the border's median: (frames, 3, h, w) in [0, 1]."""
    border = torch.cat(
        (video[..., :2, :].flatten(2), video[..., -2:, :].flatten(2), video[..., :2].flatten(2)), 2
    )
    median = border.transpose(0, 1).flatten(1).median(1).values
    palette = torch.tensor(list(data.COLOURS.values())) / 255
    return data.COLOUR_NAMES[int((palette - median).square().sum(1).argmin())]


def _tracks(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid x, centroid y (shares of the frame) and area of what differs from the ground."""
    ground = video[..., :2, :].flatten(2).transpose(0, 1).flatten(1).median(1).values
    weight = (video - ground[None, :, None, None]).abs().amax(1)
    weight = torch.where(weight > 0.15, weight, 0.0)
    size = video.shape[-1]
    line = (torch.arange(size) + 0.5) / size
    total = weight.sum((1, 2)).clamp(min=1e-6)
    x = (weight.sum(1) * line).sum(1) / total
    y = (weight.sum(2) * line).sum(1) / total
    return x, y, (weight > 0).float().mean((1, 2))


def motion_of(video: Tensor) -> str:
    """Which motion a clip shows, or "none": (frames, 3, h, w) in [0, 1].

    Slides and bounce by the centroid's track, growth by the area's, and spin against wobble by
    the middle frame, which a spin shows upside down and a wobble as at the start.
    """
    x, y, area = _tracks(video)
    third = max(len(video) // 4, 1)
    across = float(x[-third:].mean() - x[:third].mean())
    down = float(y[-third:].mean() - y[:third].mean())
    growth = float((area[-third:].mean() / area[:third].mean().clamp(min=1e-6)).log())
    if max(abs(across), abs(down)) > 0.15:
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"
    if abs(growth) > 0.6:
        return "grow" if growth > 0 else "shrink"
    if float(y.max() - y.min()) > 0.14:
        return "bounce"
    first, quarter, middle = (
        _centred(video, x, y, i) for i in (0, len(video) // 8, len(video) // 2)
    )
    if float((quarter - first).abs().mean()) < 0.01:
        return "none"
    upside_down = float((first.flip((-2, -1)) - middle).abs().mean())
    return "spin" if upside_down < float((first - middle).abs().mean()) else "wobble"


def _centred(video: Tensor, x: Tensor, y: Tensor, index: int) -> Tensor:
    """One frame, shifted so that its object lies in the middle."""
    size = video.shape[-1]
    shift = [round(size * (0.5 - float(y[index]))), round(size * (0.5 - float(x[index])))]
    return torch.roll(video[index], shift, dims=(-2, -1))


class CaptionClassifier:
    """Names from pictures: a linear layer on efficientnet-lite0 features of real renders.

    names: the classes, those that the judged model knows.
    """

    def __init__(self, size: int, frames: int, names: list[str]) -> None:
        self.names = names
        generator = Generator().manual_seed(11)
        places = torch.tensor([data.NAMES.index(name) for name in names])
        classes = torch.arange(len(names)).repeat(VIEWS)
        images = real_pictures(places[classes], size, frames, generator)
        features = metrics.lite0_features(images)
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        normal = (features - self.mean) / self.std
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(features.shape[1], len(names))
        optimiser = torch.optim.AdamW(self.layer.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(self.layer(normal), classes)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        fresh = torch.arange(len(names)).repeat(4)
        held = metrics.lite0_features(real_pictures(places[fresh], size, frames, generator))
        self.accuracy = float((self.scores(held).argmax(1) == fresh).float().mean())

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Log-probabilities of the names, (n, names)."""
        return self.layer((features - self.mean) / self.std).log_softmax(1)


def real_pictures(names: Tensor, size: int, frames: int, generator: Generator) -> Tensor:
    """Real pictures in [0, 1] at the model's resolution, or one frame each of clips."""
    pictures = data.sprites()
    colours = torch.randint(len(data.COLOURS), (len(names),), generator=generator)
    if frames == 1:
        return (data.render_images(pictures, names, colours, size, generator) + 1) / 2
    motions = torch.randint(len(data.MOTIONS), (len(names),), generator=generator)
    times = data.even_times(frames)
    clips = data.render_videos(pictures, names, colours, motions, times, size, generator)
    chosen = torch.randint(frames, (len(names),), generator=generator)
    return (clips[torch.arange(len(names)), :, chosen] + 1) / 2


def real_clips(captions: list[str], size: int, frames: int, seed: int = 12) -> Tensor:
    """Renders of captions: (n, frames, 3, size, size) in [0, 1]; one frame for pictures."""
    parsed = [data.parse(caption) for caption in captions]
    names = torch.tensor([data.NAMES.index(name) for name, _, _ in parsed])
    colours = torch.tensor([data.COLOUR_NAMES.index(colour) for _, colour, _ in parsed])
    generator = Generator().manual_seed(seed)
    if frames == 1:
        images = data.render_images(data.sprites(), names, colours, size, generator)
        return (images[:, None] + 1) / 2
    motions = torch.tensor([data.MOTION_NAMES.index(motion) for _, _, motion in parsed if motion])
    times = data.even_times(frames)
    clips = data.render_videos(data.sprites(), names, colours, motions, times, size, generator)
    return (clips.transpose(1, 2) + 1) / 2


def reference_features(size: int, frames: int, names: list[str]) -> Tensor:
    """Features of real clips of other captions than those judged: what KID compares with."""
    entries = data.combinations(video=frames > 1, held=False, names=names)
    order = torch.randperm(len(entries), generator=Generator().manual_seed(13))[:REFERENCE]
    captions = [data.caption(*entries[int(index)]) for index in order]
    return clip_features(real_clips(captions, size, frames, seed=14))


def clip_features(clips: Tensor) -> Tensor:
    """lite0 features of the first, middle and last frame of clips (n, frames, 3, h, w)."""
    return torch.cat([metrics.lite0_features(clips[:, frame]) for frame in _frames(clips)])


def _frames(clips: Tensor) -> list[int]:
    return sorted({0, clips.shape[1] // 2, clips.shape[1] - 1})


def generated_clips(pipe: Any, call: dict[str, Any], captions: list[str]) -> Tensor:
    """What the model makes of captions, in the form of `real_clips`; seed = place in the list."""
    made = []
    for index, caption in enumerate(captions):
        generator = Generator().manual_seed(index)
        out = pipe(**call | {"prompt": caption}, generator=generator, output_type="np")
        array = out.frames[0] if hasattr(out, "frames") else out.images[:1]
        made.append(torch.from_numpy(np.asarray(array)).permute(0, 3, 1, 2).float())
    return torch.stack(made)


def distances_to_real(clips: Tensor, captions: list[str], views: int = 48) -> Tensor:
    """How far each clip is from the nearest of `views` real renders of its own caption, (n,).

    Cosine distance of lite0 features, averaged over the frames judged. Finer than recognition: it
    tells a clean drawing from a blurred one that is still recognised.
    """
    frames, size = clips.shape[1], clips.shape[-1]
    found = torch.empty(len(clips))
    for caption in sorted(set(captions)):
        mine = torch.tensor([index for index, each in enumerate(captions) if each == caption])
        real = _unit_views(caption, views, size, frames)
        similarity = torch.einsum("fnd,fvd->nv", _unit_features(clips[mine]), real)
        found[mine] = 1 - similarity.amax(1) / len(_frames(clips))
    return found


@functools.cache
def _unit_views(caption: str, views: int, size: int, frames: int) -> Tensor:
    """Kept, as every run of the same captions is compared with the same renders."""
    return _unit_features(real_clips([caption] * views, size, frames, seed=15))


def _unit_features(clips: Tensor) -> Tensor:
    """Features of unit length by judged frame: (frames, n, 1280)."""
    features = clip_features(clips).unflatten(0, (len(_frames(clips)), -1))
    return torch.nn.functional.normalize(features, dim=-1)


def contrast(clips: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of clips (n, frames, 3, h, w), (n,).

    Blur lowers it, which pooled features hardly see. To be read beside that of real renders.
    """
    across = (clips[..., 1:] - clips[..., :-1]).square().flatten(1).mean(1)
    down = (clips[..., 1:, :] - clips[..., :-1, :]).square().flatten(1).mean(1)
    return across + down


def paired_difference(worse: Tensor, better: Tensor) -> dict[str, float]:
    """Mean of `worse − better` over pairs with its 95 % bootstrap interval."""
    difference = worse - better
    picks = torch.randint(
        len(difference), (2000, len(difference)), generator=Generator().manual_seed(16)
    )
    low, high = difference[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": float(difference.mean()), "low": low, "high": high}


def scores(clips: Tensor, captions: list[str], judge: CaptionClassifier, real: Tensor) -> dict:
    """All formula scores of clips (n, frames, 3, h, w) for their captions."""
    parsed = [data.parse(caption) for caption in captions]
    features = clip_features(clips)
    per_frame = judge.scores(features).unflatten(0, (len(_frames(clips)), -1))
    guesses = per_frame.mean(0).argmax(1)
    names = [judge.names[int(guess)] for guess in guesses]
    result = {
        "colour": _share(
            colour_of(c) == colour for c, (_, colour, _) in zip(clips, parsed, strict=True)
        ),
        "caption_top1": _share(
            guess == name for guess, (name, _, _) in zip(names, parsed, strict=True)
        ),
        "kid": metrics.kid(real, features),
    }
    if clips.shape[1] > 1:
        result["motion"] = _share(
            motion_of(c) == m for c, (_, _, m) in zip(clips, parsed, strict=True)
        )
    return result


def _share(hits: Any) -> float:
    found = [bool(hit) for hit in hits]
    return sum(found) / len(found)


def evaluate(model: str, captions: list[str], steps: list[int], guidance: list[float]) -> dict:
    """Scores of a zoo model for several step counts and guidance scales."""
    pipe, call, _ = model_zoo.load(model)
    size, frames = call["height"], call.get("num_frames", 1)
    names = text.known_names(pipe)
    judge = CaptionClassifier(size, frames, names)
    real = real_clips(captions, size, frames)
    known = reference_features(size, frames, names)
    result: dict[str, Any] = {
        "model": model,
        "prompts": len(set(captions)),
        "clips": len(captions),
        "names": len(names),
        "classifier_accuracy_on_real": judge.accuracy,
        "real": scores(real, captions, judge, known)
        | {
            "distance_to_real": float(distances_to_real(real, captions).mean()),
            "contrast": float(contrast(real).mean()),
        },
        "runs": [],
    }
    scale_name = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    settings = [(count, call[scale_name]) for count in steps]
    settings += [(max(steps), scale) for scale in guidance]
    first: dict[str, Tensor] | None = None
    for count, scale in settings:
        arguments = call | {"num_inference_steps": count, scale_name: scale}
        clips = generated_clips(pipe, arguments, captions)
        found = {"distance": distances_to_real(clips, captions), "contrast": contrast(clips)}
        row = {"steps": count, "guidance": scale, **scores(clips, captions, judge, known)}
        row["distance_to_real"] = float(found["distance"].mean())
        row["contrast"] = float(found["contrast"].mean())
        if first is None:
            first = found
        else:
            for name, values in found.items():
                row[f"{name}_over_first"] = paired_difference(values, first[name])
        print(json.dumps(row), flush=True)
        result["runs"].append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--part", default="final", choices=["train", "heldout", "final"])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1, help="clips of each caption")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20, 10, 5])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines = model_zoo.prompts(options.model, options.part).read_text().splitlines()
    captions = lines[: options.num_prompts] * options.seeds
    result = evaluate(options.model, captions, options.steps, options.guidance)
    if options.json:
        command = " ".join(["python -m demos.zoo.evaluate", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}))


if __name__ == "__main__":
    main()

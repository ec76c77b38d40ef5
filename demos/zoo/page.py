"""Fill the tables and loss curves of `docs/zoo.md`: `python -m demos.zoo.page`.

Reads the models under zoo/, their `benchmarks/results/emoji-*-quality.json` (`demos.zoo.evaluate`),
`emoji-unet-pairs.json` (`demos.zoo.evaluate_pairs`) and `zoo-dynamics.json` (`demos.zoo.dynamics`)
there, and zoo/emoji-unet/loras.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from accel import model_zoo
from demos.zoo import card

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/zoo.md")
PICTURES = Path("docs/img")


def parameters(name: str) -> dict[str, int]:
    """Weights of each part of a model."""
    found = {}
    for file in sorted((Path("zoo") / name).glob("*/*.safetensors")):
        if (file.parent / "config.json").exists():
            with safe_open(file, framework="pt") as content:
                sizes = [content.get_slice(key).get_shape() for key in content.keys()]  # noqa: SIM118
            found[file.parent.name] = sum(math.prod(size) for size in sizes)
    return found


def models() -> str:
    """How large each model is, and what its training cost."""
    rows = []
    for name in model_zoo.names():
        weights = parameters(name)
        denoiser = weights.get("transformer", weights.get("unet", 0))
        curve = card.curve_of(Path("zoo") / name)
        rows.append(
            [
                f"`zoo/{name}`",
                f"{denoiser / 1e6:.2f} M",
                f"{sum(weights.values()) / 1e6:.2f} M",
                f"{curve[-1][0]:.0f} steps, {card.minutes_of(curve):.0f} minutes",
            ]
        )
    head = ["model", "denoiser", "all parts", "denoiser and text encoder trained"]
    return card.table(head, rows)


def scores() -> str:
    """The evaluations, one row each."""
    rows = []
    for name in model_zoo.names():
        result = json.loads((RESULTS / f"{name}-quality.json").read_text())
        for label, run in [("real renders", result["real"])] + [
            (f"{run['steps']} steps, guidance {run['guidance']:g}", run) for run in result["runs"]
        ]:
            motion = f"{run['motion']:.0%}" if "motion" in run else ""
            cells = [
                f"{run['colour']:.0%}",
                motion,
                f"{run['caption_top1']:.0%}",
                f"{run['kid']:.3f}",
            ]
            rows.append(
                [
                    f"{name}, {result['clips']} results" if label == "real renders" else "",
                    label,
                    *cells,
                ]
            )
    return card.table(["", "", "colour", "motion", "caption", "KID"], rows)


def inside(dynamics: dict[str, Any]) -> str:
    """What was seen in uncached runs, with a verdict on each law."""
    rows = []
    for name, found in dynamics["models"].items():
        seen = found["verdicts"]
        near, first, least, last = (
            seen[key]
            for key in ("ratio_share_near_one", "change_first", "change_least", "change_last")
        )
        both = min(first, last) > 1.5 * least
        rising = seen["cosine_rank_correlation"] > 0.5
        rows.append(
            [
                name,
                f"{seen['ratio_median']:.3f}, within 5 % of 1 at {near:.0%} of the steps",
                f"{'yes' if both else 'no'}: {first:.3f}, {least:.3f}, {last:.3f}",
                f"{'yes' if rising else 'no'}: "
                f"{seen['cosine_first']:.3f} to {seen['cosine_last']:.3f}",
            ]
        )
    head = [
        "",
        "residual's norm over the step before, median",
        "U-shaped change (first tenth, least, last tenth)",
        "cosine of the branches rises (first to last tenth)",
    ]
    return card.table(head, rows)


def besides(dynamics: dict[str, Any]) -> str:
    """Autoencoders and seeds."""
    rows = [
        [
            name,
            f"{found['reconstruction_psnr']:.1f} dB",
            f"{found['reconstruction_kid']:.3f} ({found['real_kid']:.3f})",
            f"{found['seeds_apart']:.1f}",
            f"{found['real_apart']:.1f}",
        ]
        for name, found in dynamics["models"].items()
    ]
    head = [
        "",
        "autoencoder's PSNR",
        "its KID (that of real renders)",
        "features apart, by seed",
        "real renders of one caption apart",
    ]
    return card.table(head, rows)


def pairs() -> str:
    """Captions of two objects."""
    result = json.loads((RESULTS / "emoji-unet-pairs.json").read_text())
    columns = ["colour", "first", "second", "both", "swapped"]
    rows = [
        ["real renders" if name == "real" else name, *(f"{found[key]:.0%}" for key in columns)]
        for name, found in result.items()
        if isinstance(found, dict)
    ]
    return card.table(["", *columns], rows)


def loras() -> str:
    """How strongly each LoRA shows."""
    return card.lora_table(json.loads(Path("zoo/emoji-unet/loras.json").read_text()))


def about() -> str:
    """What each model is."""
    return "\n".join(
        f"- **{name}**, `{card.ABOUT[name][0]}`. {card.ABOUT[name][1]}"
        for name in model_zoo.names()
    )


def sections() -> dict[str, str]:
    """What stands between the marks of the page."""
    dynamics = json.loads((RESULTS / "zoo-dynamics.json").read_text())
    return {
        "models": f"{about()}\n\n{models()}",
        "scores": scores(),
        "dynamics": inside(dynamics),
        "besides": besides(dynamics),
        "pairs": pairs(),
        "loras": loras(),
    }


def filled(text: str, parts: dict[str, str]) -> str:
    """`text` with each part between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    for name, part in parts.items():
        head, begin, rest = text.partition(f"<!-- {name}:begin -->")
        _, end, tail = rest.partition(f"<!-- {name}:end -->")
        if not begin or not end:
            raise SystemExit(f"{PAGE}: the marks of {name} are missing")
        text = f"{head}{begin}\n{part}\n{end}{tail}"
    return text


def plot(output: Path) -> None:
    """Loss curves of all models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = model_zoo.names()
    figure, axes = pyplot.subplots(1, len(names), figsize=(11, 2.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        steps, _, losses = zip(*card.curve_of(Path("zoo") / name), strict=True)
        axis.loglog(steps, losses)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    plot(PICTURES / "zoo-loss.png")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), sections()), encoding="utf-8")

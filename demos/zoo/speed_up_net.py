"""Train SpeedUpNet for `emoji-unet` and compare it with full guidance.

    python -m demos.zoo.speed_up_net train --minutes 12
    python -m demos.zoo.speed_up_net score --json benchmarks/results/emoji-unet-speed-up-net.json

Guidance distillation and multi-step consistency: the run is cut into four segments, and from the
start or the middle of one the student's one DDIM step must land where the teacher's steps lead, at
the segment's end. In half of the trajectories a segment starts where the student itself landed.
Training goes on from the adapter beside the model, if there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

import accel
from accel import model_zoo
from accel.samplers import speed_up_net
from demos.zoo import amx, train
from demos.zoo.few_steps import Teacher, judged

BATCH, GROUP, GROUPS = 16, 32, 40
SEGMENTS, SUBSTEPS = 4, 6
GUIDED = 0.1
"""Weight of guidance distillation."""
FILE = Path("zoo/emoji-unet") / speed_up_net.FILE_NAME


class Student(nn.Module):
    """The frozen U-Net with the adapter inside its cross-attention and beside its weights."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.net = speed_up_net.fresh(unet)
        self.net.weights.attach(unet)
        self._unet = [unet]  # not a submodule: its weights are not trained and not averaged
        self.texts: tuple[Tensor, Tensor] | None = None
        layers = speed_up_net.cross_attention(unet)
        for layer, part in zip(layers, self.net.layers.values(), strict=True):
            layer.module.set_processor(Processor(self, part))

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt: Tensor, negative: Tensor) -> Tensor:
        self.texts = prompt, negative
        noise: Tensor = self._unet[0](noisy, timesteps, prompt).sample
        return noise


class Processor:
    """Cross-attention of Stable Diffusion with the adapter before its output projection."""

    def __init__(self, student: Student, layer: nn.Module) -> None:
        self.student, self.layer = student, layer

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        assert self.student.texts is not None
        query, key, value = (
            each.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for each in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        mixed = self.layer(attended, query, *self.student.texts)
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return output


@torch.no_grad()
def segments(teacher: Teacher, student: Student) -> dict[str, Tensor]:
    """Starts and middles of segments of guided trajectories, and where these end; cached.

    Of every three groups two have the empty negative prompt, the third has captions. Every second
    group starts its segments where the student landed.
    """
    file = train.CHECKPOINTS / "emoji-unet-sun-segments.pt"
    if file.exists():
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    generator = Generator().manual_seed(23)
    path = torch.linspace(999, -1, SEGMENTS * SUBSTEPS + 1).round().int().tolist()
    rows: list[tuple[Tensor, ...]] = []
    for group in range(GROUPS):
        _, prompts = teacher.batch(GROUP, generator)
        _, negatives = teacher.batch(GROUP, generator)
        if group % 3:
            negatives = torch.full((GROUP,), len(teacher.states) - 1)
        start = torch.randn(GROUP, *teacher.latents.shape[1:], generator=generator)
        texts = teacher.states[prompts], teacher.states[negatives]
        for first in range(0, SEGMENTS * SUBSTEPS, SUBSTEPS):
            part = path[first : first + SUBSTEPS + 1]
            latents, estimates = teacher.solved(start, part, *texts)
            here, end = (torch.full((GROUP,), each) for each in (part[0], part[-1]))
            for place in (0, SUBSTEPS // 2):
                now = torch.full((GROUP,), part[place])
                point = latents[place], now, end, prompts, negatives
                rows.append((*point, latents[-1], estimates[place]))
            if group % 2:
                start = teacher.moved(start, student(start, here, *texts), here, end)
            else:
                start = latents[-1]
        print(f"trajectories {GROUP * (group + 1)}", flush=True)
    names = ("latents", "timesteps", "ends", "prompts", "negatives", "landed", "guided")
    found = {n: torch.cat(part) for n, part in zip(names, zip(*rows, strict=True), strict=True)}
    torch.save(found, file)
    return found


def distillation(
    teacher: Teacher, student: Student, known: dict[str, Tensor], bf16: bool, generator: Generator
) -> Tensor:
    """Distance to where the teacher lands, and to its guided noise estimate."""
    rows = torch.randint(len(known["latents"]), (BATCH,), generator=generator)
    batch = {name: values[rows] for name, values in known.items()}
    texts = teacher.states[batch["prompts"]], teacher.states[batch["negatives"]]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        noise = student(batch["latents"], batch["timesteps"], *texts).float()
    landed = teacher.moved(batch["latents"], noise, batch["timesteps"], batch["ends"])
    consistent = (landed - batch["landed"]).square().mean((1, 2, 3))
    guided = (noise - batch["guided"]).square().mean((1, 2, 3))
    return ((consistent + 1e-3).sqrt() - 1e-3**0.5 + GUIDED * guided).mean()


def train_adapter(minutes: float, bf16: bool) -> None:
    """Fit the new keys, values and affine maps, and the offsets of the weights."""
    teacher = Teacher()
    student = Student(model_zoo.load("emoji-unet")[0].unet.requires_grad_(False))
    if FILE.exists():
        student.net.load_state_dict(load_file(FILE))
    known = segments(teacher, student)
    averaged = train.fit(
        "emoji-unet-sun",
        student,
        partial(distillation, teacher, student, known, bf16),
        minutes=minutes,
        lr=1e-3,
        ema=0.995,
    )
    weights = {key.removeprefix("net."): value.half() for key, value in averaged.items()}
    FILE.parent.mkdir(exist_ok=True)
    save_file(weights, FILE)


def solver(pipe: Any) -> Any:
    """The pipeline with DPM-Solver++ at trailing timesteps."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    return pipe


def score(part: str, seeds: int) -> dict[str, Any]:
    """Scores with 4 steps and 25, and the ratio of their times, taken in turns."""
    full, call, _ = model_zoo.load("emoji-unet")
    solver(full)
    fast = solver(model_zoo.load("emoji-unet")[0])
    accel.patch(fast, accel.SpeedUpNet())
    four, many = call | {"num_inference_steps": 4}, call | {"num_inference_steps": 25}
    result: dict[str, Any] = {
        "scores": judged(
            {
                "speed_up_net, 4 steps": (fast, four),
                "guidance 4, 25 steps": (full, many),
                "guidance 4, 4 steps": (full, four),
                "no guidance, 4 steps": (full, four | {"guidance_scale": 1.0}),
            },
            part,
            seeds,
        )
    }
    for batch in (1, 8):
        ratios = [_seconds(full, many, batch) / _seconds(fast, four, batch) for _ in range(9)]
        times = {"median": statistics.median(ratios), "all": sorted(ratios)}
        result[f"speedup, {batch} at once"] = times
    result["negative"] = negative_acts(fast, full, four, many, part)
    return result


def negative_acts(
    fast: Any, full: Any, four: dict[str, Any], many: dict[str, Any], part: str
) -> dict[str, float]:
    """How a negative prompt (the same object on black) changes results, beside full guidance.

    `direction` is the mean cosine between the changes that it makes in the two.
    """
    lines = model_zoo.prompts("emoji-unet", part).read_text().splitlines()[:16]  # type: ignore[arg-type]
    cosines, sizes = [], []
    for seed, line in enumerate(lines):
        changes = []
        for pipe, arguments in ((fast, four), (full, many)):
            named = line.split(" on ")[0] + " on a black background"
            pictures = [
                pipe(
                    **arguments | {"prompt": line, "negative_prompt": negative},
                    generator=Generator().manual_seed(seed),
                    output_type="pt",
                ).images
                for negative in ("", named)
            ]
            changes.append((pictures[1] - pictures[0]).flatten())
        cosines.append(float(functional.cosine_similarity(*changes, dim=0)))
        sizes.append([float(each.abs().mean()) for each in changes])
    return {
        "direction": statistics.mean(cosines),
        "change": statistics.mean(size[0] for size in sizes),
        "change_of_full_guidance": statistics.mean(size[1] for size in sizes),
    }


def _seconds(pipe: Any, arguments: dict[str, Any], batch: int) -> float:
    texts = {"prompt": ["cat on a gray background"] * batch, "negative_prompt": [""] * batch}
    began = time.perf_counter()
    pipe(output_type="pt", **arguments | texts)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--bf16", action="store_true", help="see amx.py")
    parser.add_argument("--part", default="final", choices=["heldout", "final"])
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each caption")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "train":
        with amx.quick([]):
            train_adapter(options.minutes, options.bf16)
        return
    command = " ".join(["python", "-m", "demos.zoo.speed_up_net", *sys.argv[1:]])
    result = {"command": command, "part": options.part, "seeds": options.seeds}
    result |= score(options.part, options.seeds)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

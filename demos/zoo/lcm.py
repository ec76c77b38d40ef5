"""Train the LoRA that lets `emoji-unet` work in four steps without guidance, and score it.

    python -m demos.zoo.lcm train --minutes 12
    python -m demos.zoo.lcm score --json zoo/emoji-unet/lcm.json

A latent consistency model (Luo et al. 2023) as a LoRA. The network learns the consistency function
itself: from any point of a guided DDIM trajectory to its end. The end points are computed once,
where the paper bootstraps them from a moving average of the student: on one CPU core that needs
far fewer network calls, and pictures of 16×16 latents need no memory.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from accel import model_zoo
from demos.zoo import amx, train
from demos.zoo.few_steps import Teacher, judged

RANK, BATCH, GROUP, GROUPS = 12, 16, 32, 48
JUMP = 100
"""Timesteps of one teacher step."""
FOLDER, FILE = Path("zoo/emoji-unet/adapters"), "lcm.safetensors"


class LowRank(nn.Module):
    """Adds B·A to a weight: `down` (rank, inputs), `up` (outputs, rank), nothing at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight[0].numel()) / RANK)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(unet: nn.Module) -> dict[str, LowRank]:
    """Give every convolution and projection inside the blocks a low-rank update.

    Updating weights, and not activations as peft does, halves the time of a training step.
    """
    torch.manual_seed(0)
    found = {}
    for name, layer in list(unet.named_modules()):
        inside = name.startswith(("down_blocks", "mid_block", "up_blocks"))
        if inside and isinstance(layer, nn.Conv2d | nn.Linear):
            found[name] = LowRank(layer.weight)
            parametrize.register_parametrization(layer, "weight", found[name])
    return found


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of `LCMScheduler`: the identity at timestep 0, the clean estimate above."""
    scaled = 10.0 * timesteps.float()[:, None, None, None]
    root = (scaled.square() + 0.25).sqrt()
    return 0.25 / root.square(), scaled / root


def pairs(teacher: Teacher) -> dict[str, Tensor]:
    """Points of guided trajectories: latents, timesteps, captions, and where each ends; cached.

    Every second group of trajectories starts from noise, the others from noised pictures, as the
    later steps of a consistency model do.
    """
    file = train.CHECKPOINTS / "emoji-unet-lcm-pairs.pt"
    if file.exists():
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    generator = Generator().manual_seed(22)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for group in range(GROUPS):
        clean, captions = teacher.batch(GROUP, generator)
        start = int(torch.randint(100, 999, (1,), generator=generator)) if group % 2 else 999
        timesteps = torch.full((GROUP,), start)
        noisy = teacher.noised(clean * (group % 2), timesteps, generator)
        path = torch.linspace(start, -1, math.ceil(start / JUMP) + 1).round().int().tolist()
        empty = teacher.states[-1:].expand(GROUP, -1, -1)
        latents, _ = teacher.solved(noisy, path, teacher.states[captions], empty)
        for place, point in zip(path[:-1], latents[:-1], strict=True):
            rows.append((point, torch.full((GROUP,), place), captions, latents[-1]))
        print(f"trajectories {GROUP * (group + 1)}", flush=True)
    names = ("latents", "timesteps", "captions", "ends")
    found = {n: torch.cat(part) for n, part in zip(names, zip(*rows, strict=True), strict=True)}
    torch.save(found, file)
    return found


def consistency(
    teacher: Teacher,
    student: nn.Module,
    known: dict[str, Tensor],
    bf16: bool,
    generator: Generator,
) -> Tensor:
    """Pseudo-Huber distance between the student's answer and the end of the trajectory."""
    rows = torch.randint(len(known["ends"]), (BATCH,), generator=generator)
    noisy, timesteps = known["latents"][rows], known["timesteps"][rows]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        noise = student(noisy, timesteps, teacher.states[known["captions"][rows]]).sample.float()
    skip, out = boundary(timesteps)
    answer = skip * noisy + out * teacher.clean(noisy, noise, timesteps)
    error = (answer - known["ends"][rows]).square().mean((1, 2, 3))
    return ((error + 1e-3).sqrt() - 1e-3**0.5).mean()


def train_lora(minutes: float, bf16: bool) -> None:
    """Fit low-rank updates, the rest frozen."""
    teacher = Teacher()
    known = pairs(teacher)
    student = model_zoo.load("emoji-unet")[0].unet.requires_grad_(False)
    updates = low_rank(student)
    averaged = train.fit(
        "emoji-unet-lcm",
        student,
        partial(consistency, teacher, student, known, bf16),
        minutes=minutes,
        lr=2e-3,
        ema=0.98,
    )
    student.load_state_dict(averaged)
    save(student, updates)


def save(student: nn.Module, updates: dict[str, LowRank]) -> None:
    """The low-rank updates in fp16, named and shaped as peft has them."""
    layers = {}
    for name, update in updates.items():
        shape = student.get_submodule(name).weight.shape[1:]
        ones = [1] * (len(shape) - 1)
        layers[f"{name}.lora_A.weight"] = update.down.detach().view(RANK, *shape).half()
        layers[f"{name}.lora_B.weight"] = update.up.detach().view(-1, RANK, *ones).half()
    StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=layers, weight_name=FILE)


def loaded(scheduler: type = LCMScheduler) -> Any:
    """The model with the LoRA fused into its weights."""
    pipe = model_zoo.load("emoji-unet")[0]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)  # type: ignore[attr-defined]
    pipe.load_lora_weights(FOLDER, weight_name=FILE)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def score(part: str, seeds: int) -> dict[str, Any]:
    """Four steps with and without the LoRA, and the full run."""
    base, call, _ = model_zoo.load("emoji-unet")
    plain = model_zoo.load("emoji-unet")[0]
    plain.scheduler = LCMScheduler.from_config(plain.scheduler.config)
    alone = call | {"guidance_scale": 1.0}
    return judged(
        {
            "lcm, 4 steps": (loaded(), alone | {"num_inference_steps": 4}),
            "lcm, 2 steps": (loaded(), alone | {"num_inference_steps": 2}),
            "lcm, 4 DDIM steps": (loaded(DDIMScheduler), alone | {"num_inference_steps": 4}),
            "base, 4 LCM steps": (plain, alone | {"num_inference_steps": 4}),
            "base, 4 LCM steps, guidance 4": (plain, call | {"num_inference_steps": 4}),
            "base, 4 DDIM steps, guidance 4": (base, call | {"num_inference_steps": 4}),
            "base, 50 DDIM steps, guidance 4": (base, call),
        },
        part,
        seeds,
    )


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
            train_lora(options.minutes, options.bf16)
        return
    result = {"part": options.part, "seeds": options.seeds} | score(options.part, options.seeds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""LoRAs beside a cache, changed between and within runs: python examples/lora.py out/"""

import sys
from pathlib import Path

import torch

import accel
from accel import model_zoo

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
pipe, call, _ = model_zoo.load("emoji-unet")
accel.patch(pipe, accel.Spectrum())  # before or after loading: the order does not matter
folder = model_zoo.path("emoji-unet") / "loras"
for name in ("sepia", "trophy"):
    pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)


def draw(name: str, **options) -> None:
    noise = torch.Generator().manual_seed(0)
    picture = pipe("rocket on a blue background", **call, generator=noise, **options).images[0]
    picture.save(output / f"{name}.png")
    print(name, accel.stats(pipe).verdicts)


def weaken(pipe, step, timestep, kwargs):
    """What was cached is dropped when adapters change: the next step is computed."""
    if step == 24:
        pipe.set_adapters(["sepia"], [0.3])
    return kwargs


pipe.set_adapters(["sepia"])
draw("sepia")
draw("sepia, weaker from step 25", callback_on_step_end=weaken)
pipe.set_adapters(["sepia", "trophy"])
draw("both")
accel.patch(pipe, accel.CachedMultiLoRA())  # a pass for each instead of one with summed weights
draw("both, taking turns")

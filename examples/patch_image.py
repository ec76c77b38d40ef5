"""One picture untouched and accelerated, and what it cost: python examples/patch_image.py out/"""

import sys
import time
from pathlib import Path

import torch

import accel
from accel import metrics, model_zoo

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
pipe, call, _ = model_zoo.load("emoji-image")


def draw(name: str) -> torch.Tensor:
    """A batch of one picture, (1, 3, height, width) in [0, 1], also written to a file."""
    noise, began = torch.Generator().manual_seed(0), time.perf_counter()
    pixels = pipe("apple on a blue background", **call, generator=noise, output_type="pt").images
    print(f"{name}: {time.perf_counter() - began:.2f} s")
    pipe.image_processor.postprocess(pixels * 2 - 1)[0].save(output / f"{name}.png")
    return pixels


draw("warm-up")
untouched = draw("untouched")
accel.patch(pipe)  # the recipe beside the model; without one, EasyCache
fast = draw("accelerated")
print(accel.stats(pipe))
accel.unpatch(pipe)
print(f"PSNR {metrics.psnr(fast, untouched):.1f} dB, SSIM {metrics.ssim(fast, untouched):.3f}")
assert torch.equal(draw("untouched again"), untouched)
